"""The training set of a data root, checked and encoded at first use, and the pictures of tasks."""

from pathlib import Path

import numpy as np

from ..runtime.programs import in_precision, say
from .conditioning import TEXT
from .encoders import Encoder
from .encoding import check_given, encode_training_set, has_given_arrays
from .pairs import count_pairs, list_pairs
from .pictures import is_cropped, list_notes, read_picture
from .queries import check_stored
from .settings import read_settings
from .training_sets import (
    TrainingSet,
    array_paths,
    check_finite,
    choose_subset_size,
    extra_paths,
    open_arrays,
    open_training_set,
)


def count_images(dataroot: str | Path) -> int:
    """How many training images a data root has, whether they are encoded or not. Raises UserError
    where files are missing."""
    return len(open_arrays(dataroot)[1]) if has_given_arrays(dataroot) else count_pairs(dataroot)


def check_training_files(dataroot: str | Path, subset_size: int | None, command: str) -> int:
    """Checks the training set as far as that goes without a model. Raises UserError where files are
    missing, their numbers disagree or the subset is larger than the data; else returns how many
    images a run uses. command: that encodes them."""
    available = count_images(dataroot)
    check_given(dataroot, command)
    return choose_subset_size(available, subset_size, read_settings(dataroot)["largest_subset"])


def say_resolution(model: Encoder, settings: dict) -> None:
    """Tells where a data root brings pictures to another size than the model was trained on."""
    used, own = model.resolution(settings), model.own_resolution
    if own not in (None, used):
        say(
            f"pictures are brought to {used} x {used} pixels, as dataset.json says; the model "
            f"was trained on {own} x {own}"
        )


def prepare_training_set(
    model: Encoder,
    dataroot: str | Path,
    subset_size: int | None = None,
    vae_batch_size: int | None = None,
    command: str = "python -m unlearn encode",
) -> TrainingSet:
    """The training set of a data root, encoded first, in float32, where that was not done yet.
    command: that encodes it, for messages. Raises UserError where files are missing or do not fit
    the model."""
    settings = read_settings(dataroot)
    say_resolution(model, settings)
    resolution = model.resolution(settings)
    with in_precision("fp32"), model.encoding():  # these arrays serve runs of either precision
        size = vae_batch_size or settings["vae_batch_size"]
        encode_training_set(model, dataroot, resolution, size, command=command)
    training_set = open_training_set(
        dataroot,
        settings["name"],
        model.latent_shape(resolution),
        model.conditioning_shapes,
        subset_size,
    )
    check_finite(dataroot, training_set)
    return training_set


def imagine_training_set(
    model: Encoder, dataroot: str | Path, subset_size: int | None
) -> TrainingSet:
    """A training set of zeros of the right shape where it is not encoded yet, for what only counts
    and encodes nothing."""
    arrays = [*array_paths(dataroot), *extra_paths(dataroot, model.conditioning_shapes).values()]
    if all(path.exists() for path in arrays):
        return prepare_training_set(model, dataroot, subset_size)
    settings = read_settings(dataroot)
    say_resolution(model, settings)
    latent_shape = model.latent_shape(model.resolution(settings))
    paths, captions = list_pairs(dataroot)
    zero, count, shapes = np.float32(0), len(paths), model.conditioning_shapes
    texts = {
        name: np.broadcast_to(zero, (count, len(captions[0]), *shape))
        for name, shape in shapes.items()
    }
    return TrainingSet(
        settings["name"],
        [path.name for path in paths],
        [first for first, *_ in captions],
        paths,
        np.broadcast_to(zero, (2, count, *latent_shape)),
        texts.pop(TEXT),
        extras=texts,
    ).first(choose_subset_size(count, subset_size, settings["largest_subset"]))


def examine_pictures(tasks: list, dataroot: str | Path) -> list[str]:
    """Reads every query and exemplar once: lines on those that are odd or cropped. Raises
    UserError, naming the file, where one is truncated or no image, or where stored arrays cannot
    hold a query."""
    check_stored(tasks, dataroot)
    kinds = {
        "queries": {
            task.synth_image_path: Path(dataroot) / task.synth_image_path for task in tasks
        },
        "exemplars": {
            id: path
            for task in tasks
            for id, path in zip(task.exemplar_ids(dataroot), task.exemplar_paths)
        },
    }
    stored, notes = {task.synth_image_path for task in tasks if task.latents is not None}, []
    for kind, paths in kinds.items():
        cropped, odd = [], {}
        for name, path in paths.items():
            image, oddities = read_picture(path)
            if name not in stored:  # such a query's latent is not made of its picture
                cropped += [name] * is_cropped(image.size)
                for oddity in oddities:
                    odd.setdefault(oddity, []).append(name)
        notes += list_notes(kind, len(paths), cropped, odd, most=10)
    return notes
