"""Whether a pipeline from others may be loaded, whether its parts fit each other, and whether it
can be used: before anything is built or scored."""

import codecs
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from ..datasets.conditioning import TEXT
from ..errors import UserError
from ..runtime.programs import is_out_of_memory
from ..storage.reading import list_visible, read_json

if TYPE_CHECKING:
    from .model import Model
from .families.interface import Family, Parts
from .parts import class_names, family_of, read_config, read_index, read_parts
from .weights import check_weights

MODULES = (
    None,
    "diffusers",
    "transformers",
    "stable_diffusion",
)  # the last is the safety checker's, which is not loaded


MOST_LAYERS, MOST_OF_A_SIZE = 100, 1_000_000  # in a model's configuration


def check_marks(folder: str | Path) -> None:
    """Raises UserError where a JSON file of a pipeline is no file, on which the libraries that read it
    would wait or fail, or begins with a byte order mark, which they do not drop."""
    for path in [Path(folder) / "model_index.json", *list_visible(folder, "*/*.json")]:
        if path.exists() and not path.is_file():
            raise UserError(
                f"--sd_version {folder}: {path} is a folder, pipe or device, and no file; replace it"
            )
        with open(path, "rb") as file:
            if file.read(3) == codecs.BOM_UTF8:
                raise UserError(
                    f"--sd_version {folder}: {path} begins with a byte order mark, which "
                    f"diffusers does not read; remove it: "
                    f"sed -i '1s/^\\xef\\xbb\\xbf//' {shlex.quote(str(path))}"
                )


def check_classes(name: str | Path, index: Any, unet: str = "") -> None:
    """Raises UserError where a pipeline's index (model_index.json) names classes of other modules
    than the two libraries': files beside it, say, which some versions of diffusers would run; or
    parts of no family that is known. unet: the folder of a UNet that is used
    instead, or ""."""
    if not isinstance(index, dict) or not isinstance(index.get("_class_name"), str):
        raise UserError(
            f"--sd_version {name}: model_index.json: expected an object whose _class_name is a "
            f"pipeline of diffusers"
        )
    for part, value in index.items():
        if isinstance(value, list) and (not value or value[0] not in MODULES):
            raise UserError(
                f"--sd_version {name}: model_index.json: {part}: expected a class of diffusers "
                f"or transformers, found {value!r:.80}"
            )
    classes, family = class_names(index), family_of(name, index)
    if unet and family.denoiser != "unet":
        raise UserError(
            f"--sd_version {name}: {index['_class_name']} has a transformer instead of a UNet; no "
            f"other UNet ({unet}) can take its place"
        )
    family.check_classes(classes, lambda text: refuse(name, text))
    for part, known in family.classes.items():
        if part in classes and classes[part] not in known and not (unet and part == "unet"):
            raise UserError(
                f"--sd_version {name}: its {part} is of the class {classes[part]}; supported: "
                f"{', '.join(known)}"
            )


def check_sizes(folder: str | Path, parts: Sequence[str]) -> None:
    """Raises UserError where a configuration of a pipeline's folder asks for absurdly much: it
    would be built before its weights are looked at."""

    def visit(path, key, value):
        if isinstance(value, dict):
            for name, inner in value.items():
                visit(path, name, inner)
        elif isinstance(value, list):
            for inner in value:
                visit(path, key, inner)
        elif (
            isinstance(value, int)
            and "theta" not in key
            and abs(value) > (MOST_LAYERS if "layers" in key else MOST_OF_A_SIZE)
        ):
            raise UserError(
                f"--sd_version {folder}: {path.parent.name}/{path.name}: {key}: found "
                f"{str(value):.20}, which is no size of such a model"
            )

    for part in parts:
        for path in list_visible(Path(folder) / part, "*config.json"):
            visit(path, part, read_json(path, "--sd_version"))


def check_quantized(folder: str | Path, parts: Sequence[str]) -> None:
    """Raises UserError where the weights of a part of a pipeline's folder are quantized: they have no
    gradients."""
    for part in parts:
        path = Path(folder) / part / "config.json"
        if path.is_file() and (how := read_config(path).get("quantization_config")):
            method = how.get("quant_method") if isinstance(how, dict) else how
            raise UserError(
                f"--sd_version {folder}: its {part} is quantized ({method!s:.40}); expected weights in "
                f"float32, float16 or bfloat16: give the model that it was made of, where memory is "
                f'short with "weights": "bf16" in dataset.json (attribute --weights bf16)'
            )


def check_fit(name: str | Path, parts: Parts, unet: str = "") -> None:
    """Raises UserError, naming the numbers and what it probably is, where the parts of a pipeline
    do not fit each other, or one of them lacks what attribution asks of it."""

    own = f"its {part_name(parts.family)}"
    which = f"the UNet of {unet}" if unet else own
    parts.family.check_fit(parts, which, lambda text: refuse(name, text))


def refuse(name: str | Path, text: str) -> NoReturn:
    """Raises UserError: what a pipeline cannot be used for."""
    raise UserError(f"--sd_version {name}: {text}")


def part_name(family: Family) -> str:
    """A family's denoiser as messages name it."""
    return "UNet" if family.denoiser == "unet" else family.denoiser


def check_pipeline(folder: str | Path, unet: str = "") -> None:
    """Raises UserError where the configurations of a pipeline's folder tell that it may not be
    loaded, or cannot be used. No model is loaded. unet: the folder of a UNet that is used instead
    of its own, or ""."""
    index = read_index(folder)
    check_marks(folder)
    check_classes(folder, index, unet)
    family, classes = family_of(folder, index), class_names(index)
    for part in (*family.parts(classes), "scheduler"):
        if unet and part in ("unet", "scheduler"):
            continue
        if not (Path(folder) / part).exists():
            raise UserError(
                f"--sd_version {folder}: a folder without {part} is no pipeline of "
                f"{family.name} in diffusers' format"
            )
        if part not in classes:
            raise UserError(
                f"--sd_version {folder}: model_index.json names no class of its {part}; "
                f"{family.name} has one"
            )
    check_sizes(folder, (family.denoiser, "vae", *family.encoders, "scheduler"))
    check_quantized(folder, (family.denoiser, *family.encoders))
    if unet:
        check_sizes(Path(unet).parent, [Path(unet).name])
    check_fit(folder, read_parts(folder, unet), unet)
    check_weights(Path(folder), unet)


@torch.no_grad()
def check_passes(model: "Model", name: str | Path) -> None:
    """Raises UserError where one of a model's parts cannot take the least that it is asked for: a
    configuration may be absurd and yet load."""
    pipeline, device, family = model.pipeline, model.device, model.family
    channels, most = family.latent_channels(model.parts), family.most_latents(model.denoiser.config)
    latents, side = min(16, most or 16), 8 * pipeline.vae_scale_factor
    small = torch.zeros(1, channels, latents, latents, device=device)
    pixels = torch.zeros(1, 3, side, side, device=device)
    shapes = family.shapes(model.parts)

    def encode():
        with model.encoders_there():
            return family.encode_pixels(pipeline.vae, pixels)

    passes = {  # part -> (what it is asked, the shape that it must give)
        "vae": (encode, (1, channels, 8, 8)),
        "text_encoder": (lambda: model.encode_prompts([""])[TEXT], (1, *shapes[TEXT])),
        family.denoiser: (
            lambda: model.predict(
                small,
                torch.zeros(1, dtype=torch.int64, device=device),
                {name: torch.zeros(1, *shape, device=device) for name, shape in shapes.items()},
            ),
            small.shape,
        ),
    }
    with model.encoding():
        for part in "vae", "text_encoder":
            check_pass(name, part, *passes[part])
    check_pass(name, family.denoiser, *passes[family.denoiser])


def check_pass(
    name: str | Path, part: str, run: Callable[[], torch.Tensor], shape: Sequence[int]
) -> None:
    """Raises UserError where a part does not give the shape that it must."""
    try:
        found = run().shape
    except Exception as error:  # whatever the libraries raise
        if is_out_of_memory(error):
            raise
        raise UserError(
            f"--sd_version {name}: its {part} cannot be used as configured "
            f"({(str(error).splitlines() or ['?'])[0]:.200})"
        ) from None
    if found != shape:
        raise UserError(
            f"--sd_version {name}: its {part} cannot be used: it gives {list(found)} where "
            f"{list(shape)} is expected"
        )
