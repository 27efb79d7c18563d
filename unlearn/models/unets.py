"""The UNet of a model that was trained from scratch, from its own folder, and weights checked
against a model's."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel

from ..errors import UserError
from ..storage.reading import read_json, read_tensors

UNET_WEIGHTS = ("diffusion_pytorch_model.safetensors", "model.safetensors", "model.bin")


def check_shapes(
    path: str | Path,
    tensors: Mapping[str, torch.Tensor],
    parameters: Mapping[str, torch.Tensor],
    item: str,
) -> None:
    """Raises UserError where a tensor's name is not a parameter's or its shape is another."""
    for name, tensor in tensors.items():
        if name not in parameters:
            raise UserError(f"{path}: {item} {name} matches no weight of this model")
        if tensor.shape != parameters[name].shape:
            raise UserError(
                f"{path}: {item} {name}: expected shape {list(parameters[name].shape)}, found "
                f"{list(tensor.shape)}"
            )


def read_config(path: str | Path) -> dict:
    """A configuration, an object. Raises UserError where it is none: diffusers would take a string
    for a name on the hub."""
    config = read_json(path, "unet")
    if not isinstance(config, dict):
        raise UserError(f"unet {path}: expected an object, found {type(config).__name__}")
    return config


def check_unet_folder(folder: str | Path) -> None:
    """Raises UserError where a folder has no configuration of a UNet that was trained from scratch,
    or none of its schedule."""
    for file in ("config.json", "scheduler_config.json"):
        if not (Path(folder) / file).is_file():
            raise UserError(
                f"unet {folder}: expected a folder with config.json, scheduler_config.json and "
                f"weights, found no {file}"
            )


def load_unet(folder: str | Path, trained: bool = True) -> dict[str, Any]:
    """The parts of a pipeline that a model trained from scratch brings, from its folder: `unet`
    (config.json and weights, `diffusion_pytorch_model.safetensors` or the published `model.bin`;
    random ones, seeded, where it is not to be `trained` yet) and `scheduler`
    (scheduler_config.json). Raises UserError where one is missing or does not fit."""
    folder = Path(folder)
    check_unet_folder(folder)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            # A pair only where it is asked for the settings that it does not take.
            unet = cast(
                UNet2DConditionModel,
                UNet2DConditionModel.from_config(read_config(folder / "config.json")),
            )
        # Both concern sampling alone: latents are not bounded as pixels are, and Stable Diffusion's
        # pipeline expects the offset.
        scheduler = DDPMScheduler.from_config(
            read_config(folder / "scheduler_config.json"), clip_sample=False, steps_offset=1
        )
    except UserError:
        raise
    except Exception as error:  # an absurd configuration may raise anything
        raise UserError(
            f"unet {folder}: its configuration makes no UNet2DConditionModel ({str(error):.200})"
        ) from None
    if trained:
        path = next((folder / name for name in UNET_WEIGHTS if (folder / name).exists()), None)
        if path is None:
            raise UserError(
                f"unet {folder}: has no weights ({' or '.join(UNET_WEIGHTS)}); train them: "
                f"python -m unlearn retrain full --dataroot {shlex.quote(str(folder.parent))}"
            )
        weights, parameters = read_tensors(path, "unet"), unet.state_dict()
        check_shapes(path, weights, parameters, "weight")
        if missing := sorted(parameters.keys() - weights.keys()):
            raise UserError(f"unet {path}: lacks {len(missing)} weights, first {missing[0]}")
        unet.load_state_dict({name: weight.float() for name, weight in weights.items()})
    return {"unet": unet, "scheduler": scheduler}
