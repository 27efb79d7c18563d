"""Makes the diagonal Fisher of a data root's base model: mean squared per-sample gradient of the
selected weights; or EK-FAC, which knows how they hang together within a layer.

    python -m unlearn fisher --dataroot data/emoji --num_samples 30000
    python -m unlearn fisher --dataroot data/emoji --curvature ek-fac

Writes DATAROOT/sd_fisher.safetensors and its record. The sums so far are kept every thousand
samples: killed and run again, the same command goes on where it was. Processes, of `accelerate
launch` or of several jobs, share the samples.
"""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from ..attribution.ekfac import DIAGONAL, EKFAC
from ..attribution.estimation import (
    FEWEST_SAMPLES,
    PUBLISHED_SAMPLES,
    SAMPLES_AN_IMAGE,
    FisherSettings,
    choose_num_samples,
    choose_output,
    estimate_fisher,
)
from ..attribution.fishers import KV
from ..errors import UserError
from ..models.lora import choose_selection, is_fused
from ..models.pipelines import SELECTIONS, Model
from .flags import add_flags, make_parser, resolve
from .inputs import check_training_files, load_model, prepare_training_set


def parse_arguments(argv: Sequence[str] | None) -> Namespace:
    """The command line, resolved against the data root's defaults."""
    parser = make_parser(__doc__, "python -m unlearn fisher")
    add_flags(
        parser,
        "dataroot",
        "sd_version",
        "lora",
        "weights",
        "laion_subset_size",
        "vae_batch_size",
        "precision",
        "device",
        "overwrite",
    )
    parser.add_argument(
        "--batch_size",
        type=int,
        default=50,
        help="samples in one backward pass; memory only (default 50)",
    )
    parser.add_argument(
        "--num_samples",
        type=int,
        help=f"gradient samples (default of AbC {PUBLISHED_SAMPLES:,}, else {SAMPLES_AN_IMAGE} a "
        f"training image, at least {FEWEST_SAMPLES:,})",
    )
    parser.add_argument(
        "--weight_selection",
        choices=SELECTIONS,
        help="weights whose Fisher is made (default cross-attn-kv, of a LoRA its own matrices: lora)",
    )
    parser.add_argument(
        "--curvature",
        choices=(DIAGONAL, EKFAC),
        default=DIAGONAL,
        help="diagonal: of each weight alone (default, as published); ek-fac: of each layer in its "
        "own axes, of linear layers alone, from twice as many samples; to be named by --fisher_path",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of images, timesteps and noise (default 0)"
    )
    parser.add_argument(
        "--output",
        help="default DATAROOT/sd_fisher.safetensors or, where another model's is there, a file "
        "beside it; of ek-fac DATAROOT/sd_ekfac.safetensors",
    )
    args = parser.parse_args(argv)
    resolve(args)
    args.weight_selection = choose_selection(args.weight_selection, args.lora, KV)
    args.output = Path(args.output) if args.output else None
    if args.output and args.output.suffix != ".safetensors":
        raise UserError(f"--output {args.output}: expected a name that ends in .safetensors")
    return args


def choose_path(args: Namespace, model: Model) -> Path:
    """Where a curvature goes where nobody says. EK-FAC is never found by itself: the published
    method is the diagonal's."""
    if args.curvature == EKFAC:
        return Path(args.dataroot) / "sd_ekfac.safetensors"
    return choose_output(args.dataroot, model, args.weight_selection, args.overwrite)


def main(argv: Sequence[str] | None = None) -> None:
    """Checks, loads, accumulates, saves."""
    args = parse_arguments(argv)
    num_images = check_training_files(args)
    model = load_model(args, fuse_lora=is_fused(args.weight_selection))
    path = args.output or choose_path(args, model)
    settings = FisherSettings(
        args.num_samples or choose_num_samples(args.dataroot, num_images),
        args.weight_selection,
        args.seed,
        args.precision,
        args.curvature,
    )
    training_set = prepare_training_set(model, args)
    estimate_fisher(model, training_set, settings, path, args.batch_size, args.overwrite)
