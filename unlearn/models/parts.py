"""What the parts of a pipeline say of themselves, by their configurations."""

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import diffusers
import tokenizers
import transformers

from ..errors import UserError
from ..storage.reading import read_json
from .weights import convert_command

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


CLASSES = {
    "unet": (
        "UNet2DConditionModel",
    ),  # that can be used; a VAE must give the distribution of a picture's latent
    "vae": ("AutoencoderKL", "AsymmetricAutoencoderKL", "ConsistencyDecoderVAE"),
}


class Parts(NamedTuple):
    """What the parts of a pipeline say of themselves."""

    classes: dict  # part -> name of its class
    unet: dict  # configurations
    vae: dict
    text_encoder: dict
    tokens: int | None  # a prompt's, by the tokenizer; None where it does not say
    vocabulary: int  # tokens that the tokenizer numbers itself, without added ones
    scheduler: Any


def read_index(folder: str | Path) -> Any:
    """A pipeline's model_index.json. Raises UserError where it is none."""
    path = Path(folder) / "model_index.json"
    if not path.exists():
        raise UserError(
            f"--sd_version {folder}: a folder without {path.name} is no Stable Diffusion "
            f"pipeline in diffusers' format; of a checkpoint file or a folder of the hub's cache "
            f"one is made by: {convert_command(folder)}"
        )
    return read_json(path, "--sd_version")


def class_names(index: dict) -> dict[str, str]:
    """The class of each part that an index names."""
    return {
        part: value[1]
        for part, value in index.items()
        if isinstance(value, list) and len(value) == 2 and isinstance(value[1], str)
    }


def read_config(path: str | Path) -> dict:
    """A part's configuration, an object."""
    if not isinstance(config := read_json(path, "--sd_version"), dict):
        raise UserError(f"--sd_version {path}: expected an object, found {type(config).__name__}")
    return config


def read_parts(folder: str | Path, unet: str = "") -> Parts:
    """The Parts of a pipeline's folder by its configurations alone, with the UNet and schedule of
    the folder `unet` where one is given. Raises UserError where one cannot be read."""
    root, classes = Path(folder), class_names(read_config(Path(folder) / "model_index.json"))
    own = {"unet": "UNet2DConditionModel", "scheduler": "DDPMScheduler"} if unet else {}
    places = {
        "unet": Path(unet) if unet else root / "unet",
        "scheduler": Path(unet) if unet else root / "scheduler",
    }
    classes = {**classes, **own}

    def build(part, library, make):
        try:
            return make(getattr(library, classes[part]))
        except UserError:
            raise
        except Exception as error:  # an unknown class, a configuration that it cannot take
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"--sd_version {folder}: its {part} cannot be made of its configuration "
                f"({reason:.200})"
            ) from None

    def configured(part: str) -> dict:
        config = read_config(places.get(part, root / part) / "config.json")
        defaults = {
            name: value.default
            for name, value in inspect.signature(
                getattr(diffusers, CLASSES[part][0])
            ).parameters.items()
        }
        return {**defaults, **config}

    diffusers.utils.logging.set_verbosity_error()
    text = build(
        "text_encoder",
        transformers,
        lambda cls: cls.config_class.from_dict(read_config(root / "text_encoder/config.json")),
    )
    scheduler = build(
        "scheduler",
        diffusers,
        lambda cls: cls.from_config(read_config(places["scheduler"] / "scheduler_config.json")),
    )
    tokenizer = root / "tokenizer/tokenizer_config.json"
    return Parts(
        classes,
        configured("unet"),
        configured("vae"),
        describe_text_encoder(text),
        read_config(tokenizer).get("model_max_length") if tokenizer.exists() else None,
        count_vocabulary(root / "tokenizer"),
        scheduler,
    )


def describe_text_encoder(config: object) -> dict:
    """What is asked of a text encoder's configuration, by whatever names it has there; None where
    it has it not."""
    return {
        key: getattr(config, key, None)
        for key in ("hidden_size", "max_position_embeddings", "vocab_size")
    }


def count_vocabulary(folder: Path) -> int:
    """How many tokens a tokenizer's folder numbers, without added ones; 0 where that does not stand
    in its files."""
    try:
        if (folder / "tokenizer.json").exists():
            return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size(
                with_added_tokens=False
            )
    except Exception as error:  # whatever that library raises
        raise UserError(
            f"--sd_version {folder / 'tokenizer.json'}: no tokenizer ({error!s:.200})"
        ) from None
    return (
        len(read_json(folder / "vocab.json", "--sd_version"))
        if (folder / "vocab.json").exists()
        else 0
    )


def parts_of(pipeline: "DiffusionPipeline") -> Parts:
    """The Parts of a pipeline that is loaded."""
    classes = {
        part: type(module).__name__
        for part, module in pipeline.components.items()
        if module is not None
    }
    return Parts(
        classes,
        dict(pipeline.unet.config),
        dict(pipeline.vae.config),
        describe_text_encoder(pipeline.text_encoder.config),
        pipeline.tokenizer.model_max_length,
        getattr(pipeline.tokenizer, "vocab_size", 0),
        pipeline.scheduler,
    )
