"""Losses, unlearning and what it changes."""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from .. import noise
from ..attribution.caches import cache_columns
from ..attribution.curvature import DiagonalFisher
from ..attribution.deltas import Delta
from ..attribution.draws import ImageNoise
from ..attribution.fishers import KV, own_selection
from ..attribution.losses import changed_losses, loss_sums
from ..attribution.names import OUTPUT
from ..attribution.outputs import changed_outputs
from ..attribution.settings import LossSettings, UnlearnSettings
from ..attribution.sweeps import Sweep
from ..attribution.unlearning import unlearn_query
from ..datasets.boxes import check_box
from ..datasets.settings import AUTO, PUBLISHED
from ..datasets.training_sets import TrainingSet
from ..errors import UserError
from ..models.lora import SELECTION as LORA
from ..models.pipelines import SELECTIONS, Model, changed_weights, select_parameters
from ..runtime.programs import in_precision

PASS_SIZE = PUBLISHED["batch_size"]


def compute_losses(
    model: Model,
    images: TrainingSet,
    delta: Delta | None = None,
    cache: str | Path | None = None,
    time_samples: int | None = None,
    noise_seed: int = 0,
    precision: str = "fp32",
    batch_size: int = PASS_SIZE,
) -> np.ndarray:
    """The diffusion loss of every view of every image, float64 [2n]: n as is, then n mirrored; under
    the model, or with `delta` under the model that unlearned a query.

    cache: a folder that keeps them: called again with the same arguments it only reads, and killed
    it goes on. time_samples: timesteps of the grid, by default the data root's; noise_seed,
    precision (fp32 or tf32): the same for losses that are compared; batch_size: noisy samples in a
    pass, memory only. Source: [AbU] section 4.
    """
    sweep, identity = plan_sweep(model, images, time_samples, noise_seed, precision, batch_size)
    changed = {"weight_change": delta.content} if delta else {}
    with TemporaryDirectory() as folder, in_precision(precision):
        name = f"losses-{delta.content[:8]}.npy" if delta else "losses.npy"
        file = [Path(cache or folder) / name], [{**identity, **changed}]
        if delta is None:
            [losses] = cache_columns(sweep, model, *file, sum_alone)
        elif is_of_text(model, delta):
            with changed_losses(model, [delta.tensors]) as measure_of:
                [losses] = cache_columns(sweep, model, *file, measure_of([0]))
        else:
            with changed_weights(model.denoiser, delta.tensors):
                [losses] = cache_columns(sweep, model, *file, sum_alone)
    return losses.astype(np.float64)


def compute_output_changes(
    model: Model,
    images: TrainingSet,
    delta: Delta,
    cache: str | Path | None = None,
    time_samples: int | None = None,
    noise_seed: int = 0,
    precision: str = "fp32",
    batch_size: int = PASS_SIZE,
) -> np.ndarray:
    """How far unlearning a query moves the model's predictions of every view of every image, mean of
    || eps_theta' - eps_theta ||^2, float64 [2n]: n as is, then n mirrored. What `--scoring output`
    ranks by; losses before are not needed. Arguments as of `compute_losses`."""
    sweep, identity = plan_sweep(model, images, time_samples, noise_seed, precision, batch_size)
    identity |= {"scoring": OUTPUT, "weight_change": delta.content}
    with (
        TemporaryDirectory() as folder,
        in_precision(precision),
        changed_outputs(model, [delta.tensors], is_of_text(model, delta)) as measure_of,
    ):
        path = Path(cache or folder) / f"output-{delta.content[:8]}.npy"
        [changes] = cache_columns(sweep, model, [path], [identity], measure_of([0]))
    return changes.astype(np.float64)


def plan_sweep(
    model: Model,
    images: TrainingSet,
    time_samples: int | None,
    noise_seed: int,
    precision: str,
    batch_size: int,
) -> tuple[Sweep, dict]:
    """The sweep over all views of some images, and the identity of what it measures."""
    time_samples = time_samples or images.settings.get("time_samples", PUBLISHED["time_samples"])
    grid = noise.timestep_grid(time_samples, model.num_train_timesteps, "time_samples")
    settings = LossSettings(grid, ImageNoise(noise_seed), precision)
    return Sweep(images, grid, batch_size, settings.noise), settings.identity(model, images)


def is_of_text(model: Model, delta: Delta) -> bool:
    """Whether a weight change is of K and V, and they are what the model's layers use."""
    return own_selection(model) == KV and set(delta.tensors) == set(
        select_parameters(model.denoiser, KV)
    )


def sum_alone(*samples: Any) -> torch.Tensor:
    """`loss_sums` as a measure of one column."""
    return loss_sums(*samples)[:, None]


def selection_of(model: Model, fisher: DiagonalFisher) -> str:
    """The weights that a Fisher is of."""
    is_apart = own_selection(model) == LORA
    for name in (LORA,) if is_apart else (name for name in SELECTIONS if name != LORA):
        if select_parameters(model.denoiser, name).keys() == fisher.denominators.keys():
            return name
    raise UserError("fisher: is of other weights than this model has; load it for this model")


def unlearn(
    model: Model,
    query: TrainingSet,
    fisher: DiagonalFisher,
    lr: float | str = AUTO,
    num_train: int | None = None,
    steps: int = 1,
    draws: int = UnlearnSettings().draws_a_step,
    seed: int = 0,
    precision: str = "fp32",
    path: str | Path | None = None,
    batch_size: int = PASS_SIZE,
    box: Sequence[int] | None = None,
) -> Delta:
    """Unlearns a query: the weight change of `steps` Newton steps, each along F^-1 grad L over `draws`
    draws of noise and timestep. The model itself stays as it is.

    lr: alpha, with num_train, N: images that the model was trained on; or auto: one step that moves
    the selected weights by 4 %, whatever N. path: a .safetensors file to keep it in, with its
    record; box: (x0, y0, x1, y1), pixels of the picture: only its loss there is unlearned. Raises UserError where it diverges. Source: [AbU] Eq. 5.
    """
    if lr != AUTO and num_train is None:
        raise UserError(f"lr {lr}: needs num_train, the number of images the model was trained on")
    selection = selection_of(model, fisher)
    settings = UnlearnSettings(
        selection,
        fisher.damping,
        num_train,
        lr,
        steps,
        draws,
        1,
        seed,
        precision,
        box=check_box(box) if box else None,
    )
    parameters = select_parameters(model.denoiser, selection)
    file = None if path is None else Path(path)
    with in_precision(precision):
        return unlearn_query(model, query, parameters, fisher, settings, batch_size, file)
