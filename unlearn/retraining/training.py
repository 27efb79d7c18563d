"""Training models from scratch, alone or many at once, so that models with and without some images
can be compared."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..datasets.conditioning import map_tensors
from ..datasets.training_sets import TrainingSet
from ..errors import UserError
from ..models.checkpointing import keeping_everything
from ..models.pipelines import Model
from ..runtime.signals import finishing
from ..storage.chunks import read_tensor_chunk, write_tensor_chunk
from .batches import draw_step
from .recipes import BETAS, WEIGHT_DECAY, Recipe, Weights


def mean_losses(
    model: Model, weights: Weights, inputs: Sequence[Any], counted: torch.Tensor
) -> torch.Tensor:
    """Mean training loss of each model over its samples that count: [models], 0 where none does.

    weights: {name: [...]} of one model or {name: [models, ...]}; inputs: latents, noise, timesteps
    and conditioning, each [models, width, ...]; counted: [models, width], see `own_samples`.
    """

    family = model.family

    def losses(weights, latents, normals, timesteps, conditioning):
        noisy = model.diffuse(latents, normals, timesteps)
        times = family.times(model.levels, timesteps)
        told = model.arguments(noisy, times, conditioning)
        output = functional_call(model.denoiser, weights, (), told).sample
        prediction = model.read(output, noisy)
        errors = prediction.float() - model.target(latents, normals, timesteps)
        weight = family.weight(model.levels, timesteps)
        means = errors.square().flatten(1).mean(dim=1)
        return means if weight is None else weight * means

    each = (
        losses(weights, *map_tensors(itemgetter(0), inputs))[None]
        if len(counted) == 1
        else vmap(losses)(weights, *inputs)
    )
    return (each * counted).sum(dim=1) / counted.sum(dim=1).clamp(min=1)


def make_weights(model: Model, recipe: Recipe, num_models: int, device: torch.device) -> Weights:
    """Initial weights as leaves that need gradients, one a name: [...] of one model, [num_models,
    ...] of several."""
    weights = recipe.first_weights(model.denoiser)
    if num_models > 1:
        weights = {name: value.expand(num_models, *value.shape) for name, value in weights.items()}
    return {
        name: value.to(device).clone(memory_format=torch.contiguous_format).requires_grad_(True)
        for name, value in weights.items()
    }


@contextmanager
def plain_attention(denoiser: Any, num_models: int) -> Iterator[None]:
    """Attention as plain products where models are stacked: the fused kernels have no rule for that
    on the CPU."""
    processors = dict(getattr(denoiser, "attn_processors", {}))  # not all denoisers tell them
    kinds = [isinstance(each, AttnProcessor2_0) for each in processors.values()]
    is_usual = bool(kinds) and all(kinds)
    if num_models == 1:
        yield
    elif not is_usual:  # of blocks that join text and image, which have processors of their own
        with sdpa_kernel(SDPBackend.MATH):
            yield
    else:
        denoiser.set_attn_processor(AttnProcessor())
        try:
            yield
        finally:
            denoiser.set_attn_processor(processors)


def save_checkpoint(
    path: Path, weights: Weights, optimizer: torch.optim.Optimizer, step: int
) -> None:
    """Writes weights, moments and the number of steps taken, whole or not at all. Weights that no
    prediction depends on, as in a last block's text, have no moments: they are never trained."""
    moments = {
        f"{moment}.{name}": optimizer.state.get(weight, {}).get(moment, torch.zeros_like(weight))
        for name, weight in weights.items()
        for moment in ("exp_avg", "exp_avg_sq")
    }
    write_tensor_chunk(
        path,
        {
            **{f"weight.{name}": weight for name, weight in weights.items()},
            **moments,
            "step": torch.tensor(step),
        },
    )


def load_checkpoint(path: Path, weights: Weights, optimizer: torch.optim.Optimizer) -> int:
    """Restores weights and optimizer in place. Returns the number of steps taken, 0 where there is
    no checkpoint."""
    if not path.exists():
        return 0
    state = read_tensor_chunk(path)
    step = int(state["step"])
    moments = {
        number: {
            "step": torch.tensor(float(step)),
            **{moment: state[f"{moment}.{name}"] for moment in ("exp_avg", "exp_avg_sq")},
        }
        for number, name in enumerate(weights)
    }
    optimizer.load_state_dict(
        {"state": moments, "param_groups": optimizer.state_dict()["param_groups"]}
    )
    for name, weight in weights.items():
        weight.data.copy_(state[f"weight.{name}"])
    return step


def take_step(
    model: Model,
    weights: Weights,
    optimizer: torch.optim.Optimizer,
    inputs: Sequence[Any],
    counted: torch.Tensor,
    mixed_precision: str,
) -> None:
    """One step of the optimizer, in place, on what `draw_step` drew."""
    device = model.device
    with torch.autocast(device.type, torch.bfloat16, enabled=mixed_precision == "bf16"):
        losses = mean_losses(
            model,
            weights,
            map_tensors(lambda tensor: tensor.to(device, non_blocking=True), inputs),
            counted.to(device),
        )
    optimizer.zero_grad()
    losses.sum().backward()
    optimizer.step()


def split_models(weights: Weights, num_models: int) -> list[Weights]:
    """The weights of each model on the CPU. Raises UserError where training diverged."""
    trained = {name: weight.detach().cpu() for name, weight in weights.items()}
    for name, weight in trained.items():
        if not torch.isfinite(weight).all():
            raise UserError(
                f"training diverged: {name} is no longer finite; try a smaller --train_lr"
            )
    if num_models == 1:
        return [trained]
    return [
        {name: weight[row].clone() for name, weight in trained.items()} for row in range(num_models)
    ]


def train(
    model: Model,
    training_set: TrainingSet,
    members: np.ndarray,
    recipe: Recipe,
    checkpoint: Path | None = None,
    progress: Callable[[int], object] = lambda count: None,
) -> list[Weights]:
    """Trains one model (members [1, N]) or several at once ([M, N] bool, a row a model: the images
    it may see). Returns their weights, [{name: float32 tensor on the CPU}, ...]. A run that was
    killed goes on from `checkpoint`, after every epoch.

    Raises UserError where a model may see no image or training diverges.
    """
    if not members.any(axis=1).all():
        raise UserError("a model would be trained on no image at all; keep at least one")
    weights = make_weights(model, recipe, len(members), model.device)
    optimizer = torch.optim.AdamW(
        weights.values(), lr=recipe.rate, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True
    )
    num_images = len(training_set)
    steps_an_epoch, num_steps = recipe.steps_an_epoch(num_images), recipe.num_steps(num_images)
    start = load_checkpoint(checkpoint, weights, optimizer) if checkpoint else 0
    progress(start)
    draw = lambda step: draw_step(training_set, members, recipe, step, model.num_train_timesteps)
    with (
        ThreadPoolExecutor(1) as ahead,
        plain_attention(model.denoiser, len(members)),
        keeping_everything(model.denoiser),
        finishing() as stopping,
    ):
        upcoming = None
        for step in range(start, num_steps):
            inputs, counted = (upcoming or ahead.submit(draw, step)).result()
            upcoming = ahead.submit(draw, step + 1) if step + 1 < num_steps else None
            optimizer.param_groups[0]["lr"] = recipe.rate_at(step, num_steps)
            take_step(model, weights, optimizer, inputs, counted, recipe.mixed_precision)
            progress(1)
            if checkpoint and (step + 1) % steps_an_epoch == 0 and step + 1 < num_steps:
                save_checkpoint(checkpoint, weights, optimizer, step + 1)
                if stopping.is_set():
                    break
    return split_models(weights, len(members))
