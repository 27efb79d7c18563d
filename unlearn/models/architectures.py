"""Pipelines without their weights, by their configurations alone: whole models on the device `meta`,
whose parameters, memory and operations can be counted."""

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import diffusers
import torch
import transformers

from ..errors import UserError
from .families import find_family
from .families.interface import Parts, Tokens
from .model import Model
from .parts import describe_text_encoder, read_config, read_parts, with_defaults
from .published import PUBLISHED, Published
from .weights import stored_type

META = torch.device("meta")
LORA_RANK = 16  # of a LoRA that stands for those that people have
# as diffusers' training examples; the last is of FLUX.2
LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "to_qkv_mlp_proj"]


@dataclass(frozen=True)
class Architecture:
    """What a pipeline is made of."""

    parts: Parts
    encoders: dict[str, dict]  # configuration of each text encoder
    # precision in which the files of denoiser and text encoders have them, where these are known
    stored: dict[str, torch.dtype] = field(default_factory=dict)


def read_architecture(folder: str | Path, unet: str = "") -> Architecture:
    """The Architecture of a pipeline's folder, with the UNet of the folder `unet` where one is
    given. Raises UserError where a configuration cannot be read."""
    parts = read_parts(folder, unet)
    configs = {
        encoder: read_config(Path(folder) / encoder / "config.json") for encoder in parts.texts
    }
    stored = {part: stored_type(Path(folder), part) for part in (parts.family.denoiser, *configs)}
    stored |= {"unet": torch.float32} if unet else {}  # so it is loaded
    return Architecture(parts, configs, stored)


def published_architecture(name: str) -> Architecture:
    """The Architecture of a published model, by its name or the hub's. Raises UserError where it is
    none."""
    model = find_published(name)
    if model is None:
        raise UserError(
            f"{name}: neither a pipeline's folder nor a published model; known are "
            f"{', '.join(PUBLISHED)}"
        )
    classes = {part: kind for part, (kind, _) in model.parts.items()}
    family = find_family(model.pipeline, classes)
    if family is None:
        raise ValueError(f"{name}: a published model of no family")
    texts, configs = {}, {}
    for encoder in [part for part in family.encoders if part in classes]:
        kind, configs[encoder] = model.parts[encoder]
        made = getattr(transformers, kind).config_class(**configs[encoder])
        texts[encoder] = describe_text_encoder(made)
    denoiser, vae = (with_defaults(*model.parts[part]) for part in (family.denoiser, "vae"))
    limits = {tokenizer: Tokens(limit, 0) for tokenizer, limit in model.limits.items()}
    return Architecture(Parts(family, classes, denoiser, vae, texts, limits, None), configs)


def architecture_of(model: Model) -> Architecture:
    """The Architecture of a Model that is loaded."""
    parts = {encoder: getattr(model.pipeline, encoder) for encoder in model.encoders}
    return Architecture(model.parts, {name: part.config.to_dict() for name, part in parts.items()})


def find_published(name: str) -> Published | None:
    """A published model by its name or the hub's, None where it is not known."""
    lower = name.lower()
    found = (each for own, each in PUBLISHED.items() if lower in (own.lower(), each.hub.lower()))
    return next(found, None)


def build(architecture: Architecture) -> Model:
    """A Model on the device `meta`, float32: it has every weight's shape and no numbers. Raises
    UserError where a configuration makes no model."""
    parts = architecture.parts
    family, modules = parts.family, {}
    for part, config in (
        (family.denoiser, parts.denoiser),
        ("vae", parts.vae),
        *architecture.encoders.items(),
    ):
        try:
            module = build_part(parts.classes[part], config)
        except Exception as error:  # a configuration of others may raise anything
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"its {part} cannot be made of its configuration ({reason:.200})"
            ) from None
        modules[part] = module.to(META).eval().requires_grad_(False)
    family.prepare(modules[family.denoiser])
    pipeline: Any = SimpleNamespace(
        **modules,
        **dict.fromkeys(set(family.encoders) - modules.keys()),
        vae_scale_factor=family.pixels_a_latent(parts.vae) or 0,
    )
    model = Model(pipeline, "", torch.zeros(1000, device=META), family)
    model.parts = parts  # of a pipeline that is loaded they are found
    return model


def build_part(kind: str, config: dict, device: torch.device = META) -> torch.nn.Module:
    """A part of a class of one of the two libraries, by default on `meta`, whatever its size; on
    another device its weights are those that the class begins with."""
    with torch.device(device):
        if hasattr(diffusers, kind):
            made = getattr(diffusers, kind).from_config(config)
        else:
            cls = getattr(transformers, kind)
            made = cls(cls.config_class.from_dict(config))
    return cast(torch.nn.Module, made)


def add_lora(model: Model, rank: int = LORA_RANK) -> None:
    """Adds a LoRA beside the attention of a Model, in place."""
    from peft import (
        LoraConfig,
        inject_adapter_in_model,
    )  # here: where it is missing there is no LoRA

    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=LORA_TARGETS)
    with torch.device(model.denoiser.device):
        inject_adapter_in_model(config, model.denoiser)
    model.denoiser.requires_grad_(False)


def zeros(model: Model, resolution: int, size: int = 1) -> tuple[torch.Tensor, ...]:
    """Noisy latents of `size` samples at a resolution, and their timesteps, on the model's device."""
    noisy = torch.zeros(size, *model.latent_shape(resolution), device=model.device)
    return noisy, torch.zeros(size, dtype=torch.int64, device=model.device)


def zero_texts(model: Model, size: int = 1) -> dict[str, torch.Tensor]:
    """Conditioning of `size` texts of zeros, on the model's device."""
    shapes = model.conditioning_shapes
    return {name: torch.zeros(size, *shape, device=model.device) for name, shape in shapes.items()}
