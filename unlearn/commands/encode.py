"""Makes latents and embeddings of a data root's images and captions ahead of time.

    python -m unlearn encode --dataroot data/mscoco
    python -m unlearn encode --dataroot data/mine --num_captions 4 --skip_corrupt

Its dataset.json says where images and captions are (`images`, `captions`: captions.txt, a line an
image in the order of their names, which must be the same as text and in a file browser;
metadata.jsonl; COCO's caption annotations, *.json) and where the arrays go (`latents` [2N, C, h,
w], as is and mirrored; `embeddings`, of Stable Diffusion 1 and 2 [N, tokens, features] or [N,
captions, tokens, features], of other families each different caption's once: data/README.md). The
first pairs are shown; empty captions, those longer than the tokenizer reads or in a script that it
lacks, pictures that are transparent (they are shown on white), or of which the square crop cuts off
a third or more, are counted. Killed and run again, the same command goes on where it was. The
scripts do the same at first use.
"""

from argparse import Namespace
from collections.abc import Sequence

from ..datasets.encoding import check_given, encode_training_set, encoding_plan, has_given_arrays
from ..datasets.pairs import list_pairs, tell_overlooked, tell_pairs
from ..datasets.preparation import say_resolution
from ..datasets.training_sets import array_paths
from ..runtime.programs import log, set_precision
from .advice import encode_command
from .flags import add_flags, make_parser, resolve
from .inputs import load_model


def parse_arguments(argv: Sequence[str] | None) -> tuple[Namespace, dict]:
    """The command line, resolved against the data root's defaults: (args, settings)."""
    parser = make_parser(__doc__, "python -m unlearn encode")
    add_flags(
        parser, "dataroot", "sd_version", "lora", "weights", "vae_batch_size", "device", "dry_run"
    )
    parser.add_argument(
        "--num_captions",
        type=int,
        help="the first n captions of each image (default five of COCO's, else all)",
    )
    parser.add_argument(
        "--skip_corrupt",
        action="store_true",
        help="leave out images that cannot be read; the record names them",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace latents and embeddings that came with the data root, or whose bytes are "
        "not what their records say",
    )
    args = parser.parse_args(argv)
    return args, resolve(args)


def main(argv: Sequence[str] | None = None) -> None:
    """Checks, loads, encodes."""
    args, settings = parse_arguments(argv)
    if has_given_arrays(args.dataroot) and not args.overwrite:
        return log.info(
            f"{args.dataroot}: latents and embeddings came with it; --overwrite makes them from "
            f"images and captions"
        )
    paths, captions = list_pairs(args.dataroot, args.num_captions)
    if not args.overwrite:
        check_given(args.dataroot, encode_command(args))
    # Only the VAE and the text encoders are used.
    model = load_model(args, fuse_lora=True, trained=False)
    say_resolution(model, settings)
    if args.dry_run:
        tell_overlooked(args.dataroot, paths)
        tell_pairs(paths, captions)
        print(f"{len(captions)} images with {len(captions[0])} captions each")
        for path, size in encoding_plan(
            model, args.dataroot, captions, model.resolution(settings)
        ).items():
            print(f"{path}: {size / 1e9:.2f} GB")
        return None
    set_precision("fp32")
    made = encode_training_set(
        model,
        args.dataroot,
        model.resolution(settings),
        args.vae_batch_size,
        args.num_captions,
        args.skip_corrupt,
        args.overwrite,
        encode_command(args, num_captions=args.num_captions),
    )
    return log.info(
        f"{' and '.join(map(str, array_paths(args.dataroot)))}: "
        f"{'made' if made else 'are there already'}"
    )
