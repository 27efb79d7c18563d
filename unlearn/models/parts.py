"""What the parts of a pipeline say of themselves, by their configurations."""

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import tokenizers
import transformers

from ..errors import UserError
from ..storage.reading import read_json
from .families import SUPPORTED, Family, Parts, find_family
from .families.interface import Tokens
from .weights import convert_command

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def read_index(folder: str | Path) -> Any:
    """A pipeline's model_index.json. Raises UserError where it is none."""
    path = Path(folder) / "model_index.json"
    if not path.exists():
        raise UserError(
            f"--sd_version {folder}: expected a pipeline in diffusers' format, a folder with "
            f"{path.name}; of a checkpoint file or a folder of the hub's cache one is made by: "
            f"{convert_command(folder)}"
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


def family_of(name: str | Path, index: dict) -> Family:
    """The family of a pipeline by its index. Raises UserError, naming what was found and what is
    supported, where it is of none."""
    classes, pipeline = class_names(index), index.get("_class_name")
    family = find_family(str(pipeline), classes)
    if family is None:
        part = next((part for part in ("transformer", "prior", "unet") if part in classes), None)
        found = f"a {part} of the class {classes[part]}" if part else "no UNet"
        raise UserError(
            f"--sd_version {name}: {pipeline!s:.80} has {found}; supported are {SUPPORTED}"
        )
    return family


def read_parts(folder: str | Path, unet: str = "") -> Parts:
    """The Parts of a pipeline's folder by its configurations alone, with the UNet and schedule of
    the folder `unet` where one is given. Raises UserError where one cannot be read."""
    root, index = Path(folder), read_config(Path(folder) / "model_index.json")
    family = family_of(folder, index)
    own = {"unet": "UNet2DConditionModel", "scheduler": "DDPMScheduler"} if unet else {}
    places = {part: Path(unet) for part in own}
    classes = {**class_names(index), **own}

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
        return with_defaults(family.classes[part][0], config)

    def describe(encoder: str) -> dict:
        config = build(
            encoder,
            transformers,
            lambda cls: cls.config_class.from_dict(read_config(root / encoder / "config.json")),
        )
        return describe_text_encoder(config)

    diffusers.utils.logging.set_verbosity_error()
    texts = {encoder: describe(encoder) for encoder in family.encoders if encoder in classes}
    place = places.get("scheduler", root / "scheduler")
    scheduler = build(
        "scheduler",
        diffusers,
        lambda cls: cls.from_config(read_config(place / "scheduler_config.json")),
    )
    return Parts(
        family,
        classes,
        configured(family.denoiser),
        configured("vae"),
        texts,
        {
            tokenizer: read_tokens(root / tokenizer)
            for tokenizer in family.encoders.values()
            if tokenizer in classes
        },
        scheduler,
    )


def with_defaults(kind: str, config: dict) -> dict:
    """A configuration of a class of diffusers, with the defaults of what it does not say."""
    signature = inspect.signature(getattr(diffusers, kind))
    return {**{name: each.default for name, each in signature.parameters.items()}, **config}


def read_tokens(folder: Path) -> Tokens:
    """What a tokenizer's folder says of it."""
    path = folder / "tokenizer_config.json"
    limit = read_config(path).get("model_max_length") if path.exists() else None
    return Tokens(limit, count_vocabulary(folder))


def describe_text_encoder(config: object) -> dict:
    """What is asked of a text encoder's configuration, by whatever names it has there; None where
    it has it not. Of an encoder that reads pictures too: of what reads the text."""
    own = getattr(config, "text_config", config)
    return {
        key: getattr(own, key, None)
        for key in ("hidden_size", "max_position_embeddings", "vocab_size", "projection_dim")
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


def parts_of(pipeline: "DiffusionPipeline", family: Family) -> Parts:
    """The Parts of a pipeline that is loaded."""
    classes = {
        part: type(module).__name__
        for part, module in pipeline.components.items()
        if module is not None
    }
    found = {part: getattr(pipeline, part) for part in family.parts(classes) if part in classes}
    return Parts(
        family,
        classes,
        dict(found[family.denoiser].config),
        dict(found["vae"].config),
        {
            encoder: describe_text_encoder(found[encoder].config)
            for encoder in family.encoders
            if encoder in found
        },
        {
            tokenizer: Tokens(
                found[tokenizer].model_max_length, getattr(found[tokenizer], "vocab_size", 0)
            )
            for tokenizer in family.encoders.values()
            if tokenizer in found
        },
        pipeline.scheduler,
    )
