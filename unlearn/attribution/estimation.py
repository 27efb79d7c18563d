"""The diagonal Fisher estimated from samples: kept section by section, shared among processes."""

import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import noise
from ..datasets.conditioning import map_tensors
from ..datasets.settings import is_published_root
from ..datasets.training_sets import TrainingSet
from ..models.pipelines import Model, select_parameters
from ..models.selections import list_unread
from ..runtime.programs import log, progress
from ..runtime.signals import finishing
from ..storage.artifacts import check_writable, write_tensors
from ..storage.chunks import read_tensor_chunk, write_tensor_chunk
from ..storage.hashes import digest
from ..storage.records import (
    check_unrecorded,
    is_complete,
    keep_complete,
    read_record,
    record_path,
    tell_name,
    write_record,
)
from ..storage.sharing import Share, build_once, do_once, parts_folder
from .curvature import check_fisher, squared_gradient_sums
from .ekfac import (
    DIAGONAL,
    EKFAC,
    check_ekfac,
    check_linear,
    eigenvalue_sums,
    factor_sums,
    find_bases,
)
from .fishers import KV, own_fisher_path

CHUNK_SAMPLES = 1000
# of samples [latents, noise, timesteps, conditioning]: {name: float64 tensor}, summed over them
Measure = Callable[[Sequence], Mapping[str, torch.Tensor]]
# Samples by default: as published on AbC; elsewhere five an image, as published on MSCOCO, but at
# least so many that the ranking no longer depends on them (data/emoji_small: Spearman with that of
# 30,000 samples 0.991 from 1,000, 0.997 from 4,000).
PUBLISHED_SAMPLES, SAMPLES_AN_IMAGE, FEWEST_SAMPLES = 1_000_000, 5, 4000
# of the samples, each one process's: their sums are kept until the last is done (Stable Diffusion:
# 154 MB each)
SECTIONS = 32


@dataclass(frozen=True)
class FisherSettings:
    """How a Fisher is estimated: its identity, with model, training set and noise."""

    num_samples: int
    weight_selection: str = KV
    seed: int = 0
    precision: str = "fp32"
    curvature: str = DIAGONAL  # or ek-fac, see `ekfac`

    def identity(self, model: Model, training_set: TrainingSet) -> dict:
        """Identity of the Fisher of a model and its training images."""
        images = {"training_set": training_set.identity}
        fields = asdict(self)
        if self.curvature == DIAGONAL:  # as before there was another
            del fields["curvature"]
        if unread := list_unread(model.denoiser, self.weight_selection):
            fields["unread"] = len(unread)
        return {**model.identity, **images, **noise.identity(), **fields}


def choose_num_samples(dataroot: str | Path, num_images: int) -> int:
    """How many samples where nobody says."""
    if is_published_root(dataroot):
        return PUBLISHED_SAMPLES
    return min(PUBLISHED_SAMPLES, max(FEWEST_SAMPLES, SAMPLES_AN_IMAGE * num_images))


def choose_output(dataroot: str | Path, model: Model, selection: str, overwrite: bool) -> Path:
    """Where the Fisher of a model goes where nobody says: where all look for one, or beside that of
    another model or of other weights, which stays."""
    path = Path(dataroot) / "sd_fisher.safetensors"
    if overwrite or not is_complete(path):
        return path
    record = read_record(path, "give --overwrite to make it again")
    own = {**model.identity, "weight_selection": selection}
    if all(record["identity"].get(name) == value for name, value in own.items()):
        return path
    beside = own_fisher_path(dataroot, model, selection)
    log.info(
        f"{path}: belongs to {tell_name(path, 'model')}, and stays; the Fisher of this model "
        f"stands beside it: give --fisher_path {shlex.quote(str(beside))} to the other programs"
    )
    return beside


def estimate_fisher(
    model: Model,
    training_set: TrainingSet,
    settings: FisherSettings,
    path: Path,
    batch_size: int = 50,
    overwrite: bool = False,
) -> None:
    """Writes the diagonal Fisher, or EK-FAC, of a model's selected weights, estimated from samples of its
    training images, to `path` (safetensors) with its record, or keeps what is there. Killed and
    called again it goes on; processes share it. batch_size: samples in one backward pass; memory
    only. Raises UserError where another Fisher is there and may not be overwritten. Source: [AbU]
    section 4.1."""
    parameters = select_parameters(model.denoiser, settings.weight_selection)
    if settings.curvature == EKFAC:
        check_linear(model, parameters)
    identity = settings.identity(model, training_set)
    remedy = "give --overwrite to replace it, or another --output"

    def is_kept():
        return keep_complete(path, identity, overwrite, remedy)

    def fill(folder):
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        if settings.curvature == EKFAC:
            return estimate_ekfac(model, parameters, training_set, settings, batch_size, folder)
        measure = partial(squared_gradient_sums, model, parameters)
        return accumulate(model, measure, training_set, settings, batch_size, folder)

    def write(sums):
        if settings.curvature == EKFAC:
            tensors, told = sums, ""
            check_ekfac(path, tensors, parameters, 1, "make it again")
        else:
            tensors = {name: (value / settings.num_samples).float() for name, value in sums.items()}
            check_fisher(path, tensors, parameters, damping=1)
            zeros = sum(int((value == 0).sum()) for value in tensors.values())
            told = f", {zeros} zero entries: give --damping" if zeros else ""
        record_path(path).unlink(missing_ok=True)
        content = write_tensors(path, tensors)
        write_record(path, identity, model.device, content, {"num_images": len(training_set)})
        log.info(f"{path}: {len(parameters)} parameters, {settings.num_samples} samples{told}")
        if unread := list_unread(model.denoiser, settings.weight_selection):
            log.info(f"without {len(unread)} on which no prediction depends, first {unread[0]}")

    if not parts_folder(path, digest(identity)).is_dir():
        check_unrecorded(path, identity, overwrite, remedy)
    if is_kept():
        log.info(f"{path}: is there already")
    else:
        remedy_of_folder = (
            "give another --output, and that to compute_influence.py as --fisher_path"
        )
        check_writable(path.parent, remedy_of_folder)
    build_once(path, digest(identity), is_kept, fill, write)


def estimate_ekfac(
    model: Model,
    parameters: dict[str, torch.nn.Parameter],
    training_set: TrainingSet,
    settings: FisherSettings,
    batch_size: int,
    folder: Path,
) -> dict[str, torch.Tensor]:
    """EK-FAC in two passes, of as many samples each: the layers' factors, and in their eigenbases,
    which one process finds for all, the eigenvalues. {`ekfac.key`: float32 tensor}. Raises as
    `accumulate`."""
    path = folder / "bases.sums"

    given = training_set, settings, batch_size, folder
    if not path.exists():
        measure = partial(factor_sums, model, parameters)
        sums = accumulate(model, measure, *given, "factors-")
        do_once(folder, "bases", path.exists, lambda: write_tensor_chunk(path, find_bases(sums)))
    bases = {name: value.to(model.device) for name, value in read_tensor_chunk(path).items()}
    measure = partial(eigenvalue_sums, model, parameters, bases)
    sums = accumulate(model, measure, *given, "eigenvalues-", settings.num_samples)
    means = {name: (value / settings.num_samples).float() for name, value in sums.items()}
    return {name: value.cpu().contiguous() for name, value in {**bases, **means}.items()}


def draw_samples(
    training_set: TrainingSet, numbers: Iterable[int], num_train_timesteps: int, seed: int
) -> list[Any]:
    """The Fisher's samples of these numbers: uniform image, view, caption and timestep, and noise
    that belongs to (image, sample). Returns latents, noise, timesteps and conditioning as float32
    and int64 tensors."""
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

    def put(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.asarray(array, np.float32))

    return [
        put(training_set.latents[views, images]),
        put(np.stack(normals)),
        torch.from_numpy(np.asarray(timesteps, np.int64)),
        {name: put(array) for name, array in training_set.texts(images, captions).items()},
    ]


def sum_chunk(
    model: Model,
    measure: Measure,
    training_set: TrainingSet,
    numbers: np.ndarray,
    batch_size: int,
    seed: int,
) -> dict[str, torch.Tensor]:
    """Sum of a measure over the samples of a chunk, {name: float64 tensor}."""
    sums = {}
    for batch in np.split(numbers, np.arange(batch_size, len(numbers), batch_size)):
        drawn = draw_samples(training_set, batch.tolist(), model.num_train_timesteps, seed)
        samples = map_tensors(lambda tensor: tensor.to(model.device), drawn)
        add_sums(sums, measure(samples))
    return sums


def add_sums(sums: dict[str, torch.Tensor], more: Mapping[str, torch.Tensor]) -> None:
    """Adds sums {name: tensor} to others, in place; a name that is new begins one."""
    for name, value in more.items():
        sums[name] = sums[name] + value if name in sums else value


def sum_section(
    model: Model,
    measure: Measure,
    training_set: TrainingSet,
    seed: int,
    batch_size: int,
    samples: np.ndarray,
    checkpoint: Path,
    update: Callable[[int], object],
) -> dict[str, torch.Tensor]:
    """Sums over a section of samples, chunk by chunk, {name: float64 tensor}; `checkpoint` holds
    the sums so far."""
    state = read_tensor_chunk(checkpoint) if checkpoint.exists() else {"chunk": torch.tensor(0)}
    start = int(state.pop("chunk"))
    sums = {name: value.to(model.device) for name, value in state.items()}
    chunks = np.split(samples, np.arange(CHUNK_SAMPLES, len(samples), CHUNK_SAMPLES))
    update(sum(map(len, chunks[:start])))
    for number in range(start, len(chunks)):
        with finishing():
            add_sums(
                sums, sum_chunk(model, measure, training_set, chunks[number], batch_size, seed)
            )
            write_tensor_chunk(checkpoint, {**sums, "chunk": torch.tensor(number + 1)})
        update(len(chunks[number]))
    return sums


def accumulate(
    model: Model,
    measure: Measure,
    training_set: TrainingSet,
    settings: FisherSettings,
    batch_size: int,
    folder: Path,
    kind: str = "",
    first: int = 0,
) -> dict[str, torch.Tensor]:
    """Sums of a measure over all samples, from number `first` on, {name: float64 tensor}, section by
    section: processes share them. In `folder` the sums of each are kept, under names that begin with
    `kind`. Raises FileNotFoundError where another process was done with the folder and has removed
    it."""
    num_sections = min(SECTIONS, -(-settings.num_samples // CHUNK_SAMPLES))
    sections = np.array_split(np.arange(first, first + settings.num_samples), num_sections)
    paths = [
        folder / f"{kind}{number:02d}-of-{num_sections:02d}.sums" for number in range(num_sections)
    ]
    done = sum(len(section) for section, path in zip(sections, paths) if path.exists())
    with (
        progress(settings.num_samples, "curvature (Fisher)", "samples", done) as bar,
        Share(
            folder,
            {number: path.stem for number, path in enumerate(paths)},
            lambda number: paths[number].exists(),
        ) as share,
    ):
        for number in share:
            checkpoint = folder / f"{paths[number].stem}-so-far.sums"
            sums = sum_section(
                model,
                measure,
                training_set,
                settings.seed,
                batch_size,
                sections[number],
                checkpoint,
                bar.update,
            )
            write_tensor_chunk(paths[number], sums)
            checkpoint.unlink(missing_ok=True)
            share.release(number)
    total = {}
    for path in paths:
        add_sums(total, read_tensor_chunk(path))
    return total
