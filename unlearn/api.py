"""The Python interface: what the scripts do, step by step, for notebooks and other programs. One
call does it all, and keeps it in a folder:

    import unlearn
    [answer] = unlearn.attribute("picture.png", model="MODEL", images="FOLDER", prompt="red apple")
    answer.show(); answer.table(); answer.scores; answer.warnings; answer.save("elsewhere")

Step by step:

    import unlearn
    model = unlearn.load_model("data/emoji/pipeline")
    images = unlearn.open_training_set("data/emoji", model)
    fisher = unlearn.load_fisher("data/emoji/sd_fisher.safetensors", model)
    query = unlearn.encode_query(model, "picture.png", prompt="red apple")
    before = unlearn.compute_losses(model, images)
    delta = unlearn.unlearn(model, query, fisher, lr=1e-3, num_train=1448)
    after = unlearn.compute_losses(model, images, delta=delta)
    ranking = unlearn.rank(images, after - before)

Or by how far the model's predictions of the images move, without losses before:

    ranking = unlearn.rank(images, unlearn.compute_output_changes(model, images, delta))

Or by removal, without a Fisher and a step; features that are kept serve every query:

    scores = unlearn.removal_scores(model, images, query, cache="features")
    ranking = unlearn.rank(images, scores)
    together = unlearn.removal_group_scores(model, images, query, {"a": [0, 7]}, cache="features")

Functions raise UserError and never end the program. What is not given is the data root's, else what
suits one's own data; see the table of settings in unlearn/README.md.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from . import noise
from .attribution.caches import cache_columns
from .attribution.curvature import DiagonalFisher
from .attribution.deltas import Delta
from .attribution.draws import ImageNoise
from .attribution.fishers import KV, open_fisher, own_selection
from .attribution.losses import changed_losses, loss_sums
from .attribution.names import OUTPUT
from .attribution.outputs import changed_outputs
from .attribution.removal import RemovalSettings, own_settings
from .attribution.removal_groups import check_groups
from .attribution.removal_scores import RIDGE
from .attribution.removal_studies import RemovalStudy
from .attribution.settings import LossSettings, UnlearnSettings
from .attribution.sweeps import Sweep
from .attribution.unlearning import unlearn_query
from .datasets.boxes import check_box
from .datasets.preparation import prepare_training_set
from .datasets.queries import encode_picture
from .datasets.settings import AUTO, OWN_ROOT, PUBLISHED, read_settings
from .datasets.training_sets import TrainingSet
from .errors import UserError
from .models import pipelines
from .models.customization import customized
from .models.lora import SELECTION as LORA
from .models.pipelines import SELECTIONS, Model, changed_weights, select_parameters
from .report.ranking import Ranking, rank
from .runtime.programs import choose_device, in_precision, set_precision

__all__ = [
    "Delta",
    "DiagonalFisher",
    "Model",
    "Ranking",
    "RemovalSettings",
    "TrainingSet",
    "compute_losses",
    "compute_output_changes",
    "customized",
    "encode_query",
    "load_fisher",
    "load_model",
    "open_training_set",
    "rank",
    "removal_group_scores",
    "removal_scores",
    "unlearn",
]
PASS_SIZE = PUBLISHED["batch_size"]


def load_model(
    name: str | Path,
    device: str | None = None,
    unet: str | None = None,
    lora: str | Path | Sequence[str | Path] = (),
    fuse_lora: bool = False,
    weights: str | None = None,
) -> Model:
    """A pipeline of a known family, for scoring and unlearning.

    name: a diffusers folder, a name on the hub, or a data root, whose dataset.json says its model;
    device: cuda, cuda:N or cpu, by default cuda if there is one; unet: the folder of another UNet,
    for a model trained from scratch; lora: FILE_OR_FOLDER[:WEIGHT], one or several, whose matrices
    are then what is unlearned (weight_selection "lora") or, with fuse_lora, become part of the
    weights; weights: fp32 or bf16, in which all but what is unlearned is then held, where float32
    does not fit (default the data root's, else fp32). Raises UserError where it cannot be loaded or
    is of a family that is not known.
    """
    several = [lora] if isinstance(lora, (str, Path)) else list(lora)
    set_precision("fp32")
    if (Path(name) / "dataset.json").is_file():
        settings = read_settings(name)
        name, unet = settings["pipeline"], unet or settings["unet"]
        several = several or settings["lora"]
        weights = weights or settings["weights"]
    names = [str(each) for each in several]
    return pipelines.load_model(
        str(name),
        choose_device(device),
        unet,
        lora=names,
        fuse_lora=fuse_lora,
        weights=weights or "fp32",
    )


def open_training_set(
    dataroot: str | Path, model: Model, subset_size: int | None = None
) -> TrainingSet:
    """The training images of a data root, encoded at first use: see data/README.md on what stands in
    one. subset_size: the first so many. Raises UserError where files are missing or do not fit the
    model."""
    return prepare_training_set(model, dataroot, subset_size)


def load_fisher(
    path: str | Path,
    model: Model,
    damping: float = OWN_ROOT["damping"],
    weight_selection: str | None = None,
) -> DiagonalFisher:
    """The diagonal Fisher of a file that `python -m unlearn fisher` made, or a published one. damping:
    added to it, as a multiple of each parameter's mean entry; weight_selection: by default
    cross-attn-kv, of a model with LoRA beside its weights lora. Raises UserError where it is another
    model's."""
    weight_selection = weight_selection or own_selection(model)
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; make it: python -m unlearn fisher")
    parameters = select_parameters(model.denoiser, weight_selection)
    remedy = "make this model's own: python -m unlearn fisher"
    return open_fisher(path, model, parameters, damping, remedy)


def find_root(picture: Path) -> Path | None:
    """The data root that a picture stands in: the nearest folder above it with a dataset.json."""
    return next((folder for folder in picture.parents if (folder / "dataset.json").is_file()), None)


def encode_query(model: Model, picture: str | Path, prompt: str) -> TrainingSet:
    """A synthesized picture and its prompt as a TrainingSet of one image and one view.

    Its noise belongs to its file's name or, where it stands in a data root (below a dataset.json),
    to its path there: then it is the noise that the scripts take. Raises UserError where the
    picture cannot be read.
    """
    path = Path(picture).absolute()
    root = find_root(path)
    settings: dict = read_settings(root) if root else {"resolution": 0}
    name = settings["name"] if root else "query"
    id = path.relative_to(root).as_posix() if root else path.name
    return encode_picture(model, path, prompt, model.resolution(settings), name, id)


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


def removal_scores(
    model: Model,
    images: TrainingSet,
    query: TrainingSet,
    cache: str | Path | None = None,
    settings: RemovalSettings | None = None,
    ridge: float = RIDGE,
    repeats: tuple[int, ...] = (),
) -> np.ndarray:
    """How much less certain the model's prediction of a query would be without each image, at each
    timestep: float64 [timesteps, n], higher is more influential. `rank` sums over them and tells
    from their spread how sure the sums are.

    cache: a folder that keeps the images' features, one backward pass an image, timestep and probe:
    called again, for this query or another, only the query's own are made. settings: weights,
    timesteps, probes, numbers kept of a gradient and noise seed, by default all weights, of a LoRA
    its own matrices, and what the commands take; ridge: lambda; repeats: how often training saw each image. Raises UserError
    where the folder holds features of something else. Source: Woodbury's identity, see
    `attribution.removal`.
    """
    with TemporaryDirectory() as folder, in_precision("fp32"):
        place, settings = Path(cache or folder), settings or own_settings(model)
        study = RemovalStudy(model, {"laion": images}, place, settings, ridge, repeats)
        study.build()
        return study.score_draws([query])[0][:, 0]


def removal_group_scores(
    model: Model,
    images: TrainingSet,
    query: TrainingSet,
    groups: Mapping[str, Sequence[int]],
    cache: str | Path | None = None,
    settings: RemovalSettings | None = None,
    ridge: float = RIDGE,
    repeats: tuple[int, ...] = (),
) -> dict[str, np.ndarray]:
    """How much less certain the model's prediction of a query would be without all images of a group
    at once, at each timestep: {name: float64 [timesteps]}. That is more than the sum of the images'
    own scores where they stand in for each other. groups: {name: rows of the training set}; other
    arguments as of `removal_scores`. Raises UserError where a group holds all images, or one that is
    not there."""
    with TemporaryDirectory() as folder, in_precision("fp32"):
        place, settings = Path(cache or folder), settings or own_settings(model)
        study = RemovalStudy(model, {"laion": images}, place, settings, ridge, repeats)
        check_groups(groups, study.num_images)
        study.build()
        together = study.score_all([query], groups)[2][:, 0]
    return dict(zip(groups, together.T))
