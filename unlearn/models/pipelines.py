"""Pipelines loaded, and their weights changed and restored."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import hf_hub_download
from safetensors import safe_open
from transformers.utils import logging as transformers_logging

from ..errors import UserError
from ..runtime.programs import is_out_of_memory
from ..storage.hashes import digest, hash_tensors, named_weights
from ..storage.reading import list_visible, read_json
from . import lora as loras
from .checks import check_classes, check_fit, check_passes, check_pipeline
from .families import Family
from .lora_files import LoraFile
from .lora_layers import check_family
from .model import Model
from .parts import class_names, family_of, parts_of, read_index
from .precision import DTYPES, check_weights_type, halve
from .residence import Residence
from .selections import SELECTIONS, select_parameters
from .unets import check_unet_folder, load_unet
from .weights import find_absent, stored_type

__all__ = [
    "SELECTIONS",
    "Model",
    "changed_weights",
    "load_model",
    "replaced_weights",
    "select_parameters",
    "tracked",
]


def load_model(
    name: str | Path,
    device: torch.device | str,
    unet: str | None = None,
    trained: bool = True,
    lora: Sequence[str] = (),
    fuse_lora: bool = False,
    weights: str = "fp32",
) -> Model:
    """Loads a pipeline (folder or hub name) of a known family, float32, safetensors only; with the
    UNet and schedule of the folder `unet` instead of its own where one is given (`load_unet`), and
    with LoRA files (FILE_OR_FOLDER[:WEIGHT]), whose matrices stand beside the denoiser's weights, or
    are fused into them. weights: fp32, or bf16, in which denoiser and text encoders are held but for
    what may be unlearned (see `precision`). Raises UserError where it cannot be loaded or is of a
    family or prediction type that is not known."""
    quieten()
    check_weights_type(weights, "weights")
    unet, lora_files = unet or "", loras.read_files(lora, fuse_lora)
    if unet:
        check_unet_folder(unet)
    if Path(name).exists():
        check_pipeline(name, unet)
    replacing = load_unet(unet, trained) if unet else {}
    pipeline, family = load_pipeline(name, unet, replacing, lora_files, weights != "fp32")
    check_fit(name, parts_of(pipeline, family), unet)
    if pixels := family.pixels_a_latent(pipeline.vae.config):
        pipeline.vae_scale_factor = pixels  # that of Lumina2 takes 8 for granted
    parts = {
        part: getattr(pipeline, part)
        for part in (family.denoiser, *family.encoders, "vae")
        if getattr(pipeline, part, None) is not None
    }
    for part in parts.values():
        part.eval().requires_grad_(False)
    family.prepare(parts[family.denoiser])
    weights_hash = hash_tensors(
        {
            f"{label}.{key}": value
            for label, part in parts.items()
            for key, value in named_weights(part).items()
        },
        halves_as_float32=True,
    )
    applied = loras.apply(pipeline, family, lora_files, fuse_lora)
    if applied:
        weights_hash = digest(weights_hash, applied)
    pipeline.set_progress_bar_config(disable=True)
    levels = family.levels(pipeline.scheduler).to(device)
    if weights != "fp32":
        halve(pipeline, family, DTYPES[weights])
    residence = Residence(pipeline, family.denoiser, ("vae", *family.encoders), device)
    model = Model(pipeline, weights_hash, levels, family, applied, weights, residence)
    check_passes(model, name)
    return model


def quieten() -> None:
    """Keeps the two libraries from saying what is no concern of this program's users."""
    for logging in diffusers_logging, transformers_logging:
        logging.set_verbosity_error()
        logging.disable_progress_bar()


def load_pipeline(
    name: str | Path,
    unet: str,
    replacing: Mapping[str, Any],
    lora_files: Sequence[LoraFile],
    as_stored: bool = False,
) -> tuple[DiffusionPipeline, Family]:
    """A pipeline, float32, and its family. replacing: parts that take the place of its own; as_stored:
    denoiser and text encoders stay in the half precision in which their files have them. Raises
    UserError where it cannot be loaded or lacks weights or, before weights are read, where a LoRA is
    of another family."""
    try:
        if Path(name).exists():
            index = read_index(name)
        else:  # before gigabytes are downloaded
            index = read_json(hf_hub_download(str(name), "model_index.json"), "--sd_version")
            check_classes(name, index, unet)
        family = family_of(name, index)
        for lora in lora_files:
            check_family(lora, family)
        left_out = {part: None for part in find_unused(name, index, family)}
        texts = load_text_encoders(name, index, family)
        readers = family.load_tokenizers(name, class_names(index))
        left_out |= dict.fromkeys(readers)
        given = {**left_out, **texts, **replacing}
        if as_stored:
            given["dtype"] = find_stored(name, family, left_out) | {"default": torch.float32}
        pipeline = DiffusionPipeline.from_pretrained(name, use_safetensors=True, **given)
        if not as_stored:
            pipeline.to(dtype=torch.float32)
        pipeline.register_modules(**readers)
        parts = family.parts(class_names(index))
        if lacking := [part for part in parts if not getattr(pipeline, part, None)]:
            raise UserError(
                f"--sd_version {name}: {type(pipeline).__name__} has no {lacking[0]}, as "
                f"{family.name} does"
            )
        check_missing(name, pipeline, family)
    except UserError:
        raise
    except Exception as error:  # what the two libraries raise for a damaged file has no common type
        if is_out_of_memory(error):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"--sd_version {name}: cannot be loaded ({reason:.200})") from None
    return pipeline, family


def find_unused(name: str | Path, index: dict, family: Family) -> list[str]:
    """Parts of a pipeline's index that are not there, or not loaded because no loss asks for
    them."""
    absent = find_absent(Path(name)) if Path(name).exists() else []
    absent += sorted(set(family.optional) - class_names(index).keys())
    return [part for part in ("safety_checker", *absent) if part in index]


def find_stored(
    name: str | Path, family: Family, left_out: Mapping[str, None]
) -> dict[str, torch.dtype]:
    """The precision in which the files of a pipeline have its denoiser, {part: dtype}. Of a name on the
    hub they are downloaded for that."""
    folder = Path(name)
    if not folder.exists():
        folder = Path(DiffusionPipeline.download(str(name), use_safetensors=True, **left_out))
    return {family.denoiser: stored_type(folder, family.denoiser)}


def load_text_encoders(name: str | Path, index: dict, family: Family) -> dict[str, Any]:
    """The text encoders of a pipeline, by part. Raises UserError where a file lacks weights, which
    transformers would make up, another model at every start."""
    encoders, classes = {}, class_names(index)
    for part in [part for part in family.encoders if part in classes]:
        encoders[part], loading = getattr(transformers, classes[part]).from_pretrained(
            name, subfolder=part, use_safetensors=True, output_loading_info=True
        )
        refuse_missing(name, part, set(loading["missing_keys"]))
    return encoders


def check_missing(name: str | Path, pipeline: Any, family: Family) -> None:
    """Raises UserError where the file of a part lacks weights: diffusers leaves them without
    values."""
    for label in (family.denoiser, *family.encoders, "vae"):
        if (part := getattr(pipeline, label)) is not None:
            missing = {key for key, value in part.state_dict().items() if value.is_meta}
            refuse_missing(name, label, missing)


def refuse_missing(name: str | Path, label: str, missing: set[str]) -> None:
    """Raises UserError where a part lacks some weights."""
    if missing:
        why = "; its attention's projections are saved fused" if is_fused(name, label) else ""
        raise UserError(
            f"--sd_version {name}: its {label} lacks {len(missing)} weights, first "
            f"{min(missing)}{why}"
        )


def is_fused(name: str | Path, label: str) -> bool:
    """Whether a part of a pipeline's folder was saved with fused projections (to_qkv) of its
    attention."""
    names = []
    for path in list_visible(Path(name) / label, "*.safetensors"):
        with safe_open(path, "pt") as file:
            names += file.keys()
    return any(re.search(r"\.to_(added_)?q?kv\.", each) for each in names)


@contextmanager
def replaced_weights(
    denoiser: torch.nn.Module, weights: Mapping[str, torch.Tensor]
) -> Iterator[None]:
    """Replaces named weights by others; the exact originals come back at the end."""
    parameters = {name: value for name, value in denoiser.named_parameters() if name in weights}
    originals = {name: value.detach().clone() for name, value in parameters.items()}
    try:
        for name, value in parameters.items():
            value.data.copy_(weights[name])
        yield
    finally:
        for name, value in parameters.items():
            value.data.copy_(originals[name])


@contextmanager
def changed_weights(
    denoiser: torch.nn.Module, change: Mapping[str, torch.Tensor]
) -> Iterator[None]:
    """Adds a weight change {name: tensor}; the exact originals come back at the end."""
    parameters = dict(denoiser.named_parameters())
    with replaced_weights(
        denoiser,
        {
            name: parameters[name].detach() + delta.to(parameters[name])
            for name, delta in change.items()
        },
    ):
        yield


@contextmanager
def tracked(parameters: dict[str, torch.nn.Parameter]) -> Iterator[dict[str, torch.nn.Parameter]]:
    """Asks for gradients of these parameters; at the end nobody asks for them any more."""
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    try:
        yield parameters
    finally:
        for parameter in parameters.values():
            parameter.requires_grad_(False)
