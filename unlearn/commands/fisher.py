"""Makes the diagonal Fisher of a data root's base model: mean squared per-sample gradient of the
selected weights.

    python -m unlearn fisher --dataroot data/emoji --num_samples 30000

Writes DATAROOT/sd_fisher.safetensors and its record. The sums so far are kept every thousand
samples: killed and run again, the same command goes on where it was. Processes, of `accelerate
launch` or of several jobs, share the samples.
"""

import argparse
import shlex
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from .. import noise
from ..attribution.curvature import check_fisher, squared_gradient_sums
from ..datasets.settings import is_published_root
from ..errors import UserError
from ..models.pipelines import SELECTIONS, load_model, select_parameters
from ..runtime.programs import log, progress
from ..runtime.signals import finishing
from ..storage.artifacts import check_writable, write_tensors
from ..storage.chunks import make_folder, read_tensor_chunk, remove_folders, write_tensor_chunk
from ..storage.hashes import digest
from ..storage.records import (
    check_record,
    is_complete,
    keep_complete,
    read_record,
    record_path,
    tell_name,
    write_record,
)
from ..storage.sharing import Share, do_once
from .inputs import add_flags, check_training_files, own_fisher_path, prepare_training_set, resolve

CHUNK_SAMPLES = 1000
# Samples by default: as published on AbC; elsewhere five an image, as published on MSCOCO, but at
# least so many that the ranking no longer depends on them (data/emoji_small: Spearman with that of
# 30,000 samples 0.991 from 1,000, 0.997 from 4,000).
PUBLISHED_SAMPLES, SAMPLES_AN_IMAGE, FEWEST_SAMPLES = 1_000_000, 5, 4000
# of the samples, each one process's: their sums are kept until the last is done (Stable Diffusion:
# 154 MB each)
SECTIONS = 32


def draw_samples(training_set, numbers, num_train_timesteps, seed):
    """The Fisher's samples of these numbers: uniform image, view, caption and timestep, and noise
    that belongs to (image, sample). Returns latents, noise, timesteps and embeddings as float32 and
    int64 tensors."""
    bits = noise.image_generator(seed, training_set.name, "samples of the Fisher")
    rows = []
    for number in numbers:
        noise.seek(bits, 0, 0, 0, number)
        generator = np.random.Generator(bits)
        rows.append(
            [
                int(generator.integers(size))
                for size in (
                    len(training_set),
                    training_set.latents.shape[0],
                    training_set.embeddings.shape[1],
                    num_train_timesteps,
                )
            ]
        )
    images, views, captions, timesteps = np.array(rows).T
    normals = [
        noise.image_noise(
            seed,
            training_set.name,
            f"Fisher {training_set.ids[image]}",
            [(view, caption, timestep, number)],
            training_set.latents.shape[2:],
        )[0]
        for (image, view, caption, timestep), number in zip(rows, numbers)
    ]
    arrays = (
        training_set.latents[views, images],
        np.stack(normals),
        timesteps,
        training_set.embeddings[images, captions],
    )
    return [
        torch.from_numpy(np.asarray(array, np.int64 if array is timesteps else np.float32))
        for array in arrays
    ]


def sum_chunk(model, parameters, training_set, numbers, batch_size, seed):
    """Sum of squared gradients over the samples of a chunk, {name: float64 tensor}."""
    sums = {
        name: torch.zeros_like(value, dtype=torch.float64) for name, value in parameters.items()
    }
    for batch in np.split(numbers, np.arange(batch_size, len(numbers), batch_size)):
        samples = [
            tensor.to(model.device)
            for tensor in draw_samples(training_set, batch.tolist(), len(model.alpha_bars), seed)
        ]
        for name, squares in squared_gradient_sums(model, parameters, samples).items():
            sums[name] += squares
    return sums


def sum_section(model, parameters, training_set, args, samples, checkpoint, update):
    """Sums over a section of samples, chunk by chunk, {name: float64 tensor}; `checkpoint` holds
    the sums so far."""
    state = read_tensor_chunk(checkpoint) if checkpoint.exists() else {"chunk": torch.tensor(0)}
    start = int(state.pop("chunk"))
    sums = {
        name: state.get(name, torch.zeros_like(value, dtype=torch.float64)).to(model.device)
        for name, value in parameters.items()
    }
    chunks = np.split(samples, np.arange(CHUNK_SAMPLES, len(samples), CHUNK_SAMPLES))
    update(sum(map(len, chunks[:start])))
    for number in range(start, len(chunks)):
        with finishing():
            for name, value in sum_chunk(
                model, parameters, training_set, chunks[number], args.batch_size, args.seed
            ).items():
                sums[name] += value
            write_tensor_chunk(checkpoint, {**sums, "chunk": torch.tensor(number + 1)})
        update(len(chunks[number]))
    return sums


def accumulate(model, parameters, training_set, args, folder):
    """Sums over all samples, {name: float64 tensor}, section by section: processes share them. In
    `folder` the sums of each are kept. Raises FileNotFoundError where another process was done with
    the folder and has removed it."""
    num_sections = min(SECTIONS, -(-args.num_samples // CHUNK_SAMPLES))
    sections = np.array_split(np.arange(args.num_samples), num_sections)
    paths = [folder / f"{number:02d}-of-{num_sections:02d}.sums" for number in range(num_sections)]
    done = sum(len(section) for section, path in zip(sections, paths) if path.exists())
    with (
        progress(args.num_samples, "Fisher", "samples", done) as bar,
        Share(
            folder,
            {number: path.stem for number, path in enumerate(paths)},
            lambda number: paths[number].exists(),
        ) as share,
    ):
        for number in share:
            checkpoint = folder / f"{paths[number].stem}-so-far.sums"
            sums = sum_section(
                model, parameters, training_set, args, sections[number], checkpoint, bar.update
            )
            write_tensor_chunk(paths[number], sums)
            checkpoint.unlink(missing_ok=True)
            share.release(number)
    total = {
        name: torch.zeros_like(value, dtype=torch.float64, device="cpu")
        for name, value in parameters.items()
    }
    for path in paths:
        for name, value in read_tensor_chunk(path).items():
            total[name] += value
    return total


def parse_arguments(argv):
    """The command line, resolved against the data root's defaults: (args, settings)."""
    parser = argparse.ArgumentParser(
        prog="python -m unlearn fisher",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_flags(
        parser,
        "dataroot",
        "sd_version",
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
        default="cross-attn-kv",
        help="weights whose Fisher is made",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of images, timesteps and noise (default 0)"
    )
    parser.add_argument(
        "--output",
        help="default DATAROOT/sd_fisher.safetensors or, where another model's is there, a file "
        "beside it",
    )
    args = parser.parse_args(argv)
    settings = resolve(args)
    args.output = Path(args.output) if args.output else None
    if args.output and args.output.suffix != ".safetensors":
        raise UserError(f"--output {args.output}: expected a name that ends in .safetensors")
    return args, settings


def choose_num_samples(dataroot, num_images):
    """How many samples where nobody says."""
    return (
        PUBLISHED_SAMPLES
        if is_published_root(dataroot)
        else min(PUBLISHED_SAMPLES, max(FEWEST_SAMPLES, SAMPLES_AN_IMAGE * num_images))
    )


def choose_output(args, model):
    """Where the Fisher of a model goes where nobody says: where all look for one, or beside that of
    another model or of other weights, which stays."""
    path = Path(args.dataroot) / "sd_fisher.safetensors"
    if args.overwrite or not is_complete(path):
        return path
    record = read_record(path, "give --overwrite to make it again")
    own = {**model.identity, "weight_selection": args.weight_selection}
    if all(record["identity"].get(name) == value for name, value in own.items()):
        return path
    return own_fisher_path(args.dataroot, model, args.weight_selection)


def main(argv=None):
    """Checks, loads, accumulates, saves."""
    args, settings = parse_arguments(argv)
    num_images = check_training_files(args)
    args.num_samples = args.num_samples or choose_num_samples(args.dataroot, num_images)
    model = load_model(args.sd_version, args.device, args.unet)
    parameters = select_parameters(model.denoiser, args.weight_selection)
    beside, args.output = args.output is None, args.output or choose_output(args, model)
    training_set = prepare_training_set(model, args, settings)
    identity = {
        **model.identity,
        "training_set": training_set.identity,
        "weight_selection": args.weight_selection,
        "noise": noise.SCHEME,
        "known_answer": noise.known_answer(),
        "seed": args.seed,
        "num_samples": args.num_samples,
        "precision": args.precision,
    }
    folder = args.output.with_name(f".{args.output.stem}-{digest(identity)[:16]}")
    remedy = "give --overwrite to replace it, or another --output"
    # A Fisher without a record beside its own sums was killed between writing the one and the
    # other.
    if (
        args.output.exists()
        and not is_complete(args.output)
        and not folder.is_dir()
        and not args.overwrite
    ):
        check_record(args.output, identity, remedy)

    def keep():
        return keep_complete(args.output, identity, args.overwrite, remedy)

    def write():
        diagonal = {name: (value / args.num_samples).float() for name, value in sums.items()}
        check_fisher(args.output, diagonal, parameters, damping=1)
        record_path(args.output).unlink(missing_ok=True)
        write_record(
            args.output,
            identity,
            args.device,
            write_tensors(args.output, diagonal),
            {"num_images": len(training_set)},
        )
        zeros = sum(int((value == 0).sum()) for value in diagonal.values())
        log.info(
            f"{args.output}: {len(diagonal)} parameters, {args.num_samples} samples"
            + (f", {zeros} zero entries: give --damping" if zeros else "")
        )

    if beside and args.output.name != "sd_fisher.safetensors":
        log.info(
            f"{args.dataroot}/sd_fisher.safetensors: belongs to "
            f"{tell_name(Path(args.dataroot) / 'sd_fisher.safetensors', 'model')}, and "
            f"stays; the Fisher of {args.sd_version} stands beside it: give --fisher_path "
            f"{shlex.quote(str(args.output))} to the other programs"
        )
    if keep():
        log.info(f"{args.output}: is there already")
    while not keep():
        check_writable(
            folder.parent,
            "give another --output, and that to compute_influence.py as --fisher_path",
        )
        make_folder(folder)
        if keep():  # asked again: whoever was done in between has removed the folder for good
            break
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        with suppress(FileNotFoundError):  # the folder is gone: another process was done
            sums = accumulate(model, parameters, training_set, args, folder)
            do_once(folder, "result", keep, write)
    remove_folders(args.output)
