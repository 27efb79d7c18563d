"""Opens what attribution takes: a model, its training images, a Fisher, a query."""

from collections.abc import Sequence
from pathlib import Path

from ..attribution.curvature import DiagonalFisher
from ..attribution.fishers import open_fisher, own_selection
from ..datasets.preparation import prepare_training_set
from ..datasets.queries import encode_picture
from ..datasets.settings import OWN_ROOT, read_settings
from ..datasets.training_sets import TrainingSet
from ..errors import UserError
from ..models import pipelines
from ..models.pipelines import Model, select_parameters
from ..runtime.programs import choose_device, set_precision


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
