"""Flow matching: what Stable Diffusion 3 and FLUX have in common.

Noisy latents lie on the straight line from the picture to noise, x_t = (1 - sigma) x + sigma
epsilon, and the denoiser predicts its direction, epsilon - x. Training takes sigmas from the
scheduler's own table, in which shifts are contained, by an index drawn from a density. Here a
training timestep is the number of a quantile of that density, so that evenly spread and uniformly
drawn timesteps are those that training sees. They count up with the noise, as everywhere in this program;
the scheduler's table begins with the most noise.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from ...errors import UserError
from ...storage.hashes import digest
from .interface import Family, Original, Parts, Refuse

SCHEDULE_KEYS = ("num_train_timesteps", "shift", "use_dynamic_shifting")
SELECTIONS = {  # of a transformer's parameters whose blocks join text and image, by name
    # Weights alone: a bias adds the same to the keys, or values, of every text.
    "cross-attn-kv": r"^transformer_blocks\.\d+\.attn\.add_[kv]_proj\.weight$",
    "cross-attn": r"^transformer_blocks\.\d+\.attn\.(add_|to_add_out|norm_added_)",
    "attn": r"\.attn2?\.",
    "all": r"",
}
ATTENTION = r"\.attn2?\.(to_(q|k|v|out\.0|add_out)|add_[qkv]_proj)$"
TARGETS = {  # of LoRA that are trained: the attention's layers, or all of every block
    "attention": ATTENTION,
    "linear": rf"{ATTENTION}|\.ff(_context)?\.net\.(0\.proj|2)$|\.proj_(mlp|out)$"
    r"|\.norm1?(_context)?\.linear$",
}


def uniform(shares: torch.Tensor) -> torch.Tensor:
    """Quantiles of the uniform density on [0, 1]."""
    return shares


def logit_normal(shares: torch.Tensor) -> torch.Tensor:
    """Quantiles of the density of sigmoid(n), n standard normal. Source: Esser et al. 2024, Scaling
    rectified flow transformers, section 3.1."""
    return torch.sigmoid(torch.special.ndtri(shares))


class Flow(Family):
    """A family that matches flows; its levels are the sigmas."""

    lora_targets = TARGETS
    density: Callable[[torch.Tensor], torch.Tensor] = staticmethod(uniform)

    def indices(self, num_train_timesteps: int) -> torch.Tensor:
        """Of each training timestep its index in the scheduler's table of sigmas, int64."""
        shares = (
            torch.arange(num_train_timesteps, dtype=torch.float64) + 0.5
        ) / num_train_timesteps
        return (self.density(shares) * num_train_timesteps).long().flip(0)

    def levels(self, scheduler: Any) -> torch.Tensor:
        # A scheduler that made a picture has that picture's few sigmas.
        table = sigma_table(scheduler)
        return table[self.indices(len(table))].float()

    def prediction_type(self, scheduler: Any) -> str:
        return "flow"

    def identity(self, pipeline: Any) -> dict:
        config = pipeline.scheduler.config
        return {
            "prediction_type": self.prediction_type(pipeline.scheduler),
            "schedule": digest([config.get(key) for key in SCHEDULE_KEYS]),
            "density": self.density.__name__,
        }

    def diffuse(
        self,
        levels: torch.Tensor,
        latents: torch.Tensor,
        noise: torch.Tensor,
        timesteps: torch.Tensor,
    ) -> torch.Tensor:
        sigma = levels[timesteps][:, None, None, None]
        return (1 - sigma) * latents + sigma * noise

    def target(
        self,
        prediction_type: str,
        levels: torch.Tensor,
        latents: torch.Tensor,
        noise: torch.Tensor,
        timesteps: torch.Tensor,
    ) -> torch.Tensor:
        return noise - latents

    def times(self, levels: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        return levels[timesteps] * len(levels)

    def check_schedule(self, parts: Parts, refuse: Refuse) -> None:
        """The part of `check_fit` that concerns the scheduler."""
        name = type(parts.scheduler).__name__
        if not isinstance(parts.scheduler, FlowMatchEulerDiscreteScheduler):
            refuse(
                f"its scheduler, {name}, is none that matches flows; supported is "
                f"FlowMatchEulerDiscreteScheduler"
            )
        if parts.scheduler.config.get("invert_sigmas"):
            refuse(f"its scheduler, {name}, counts noise the other way round (invert_sigmas)")
        sigmas = sigma_table(parts.scheduler)
        if not ((sigmas > 0) & (sigmas <= 1)).all():  # so written, NaN is refused
            refuse("its scheduler's sigmas are not all between 0 and 1: its shift is damaged")

    def check_steps(self, pipeline: Any, num_steps: int) -> None:
        count = pipeline.scheduler.config.num_train_timesteps
        if not 1 <= num_steps < count:
            raise UserError(f"--num_inference_steps {num_steps}: expected 1 to fewer than {count}")

    def sampler(
        self, pipeline: Any, num_steps: int, latent_shape: Sequence[int]
    ) -> FlowMatchEulerDiscreteScheduler:
        """Euler's method on the pipeline's own schedule."""
        scheduler = make_scheduler(pipeline.scheduler)
        positions = (latent_shape[1] // self.patch) * (latent_shape[2] // self.patch)
        shift = self.shift(scheduler.config, positions, num_steps)
        scheduler.set_timesteps(**self.steps(num_steps), mu=shift)
        return scheduler

    def shift(self, config: Any, positions: int, num_steps: int) -> float | None:
        """How far dynamic shifting moves the steps of pictures of so many positions."""
        return shift_of(config, positions)

    def steps(self, num_steps: int) -> dict[str, Any]:
        """What the scheduler is told of the steps, as the family's pipeline does."""
        return {"num_inference_steps": num_steps}


def falling_sigmas(num_steps: int) -> dict[str, Any]:
    """What pipelines tell their scheduler that give it sigmas of their own: evenly from 1 down."""
    return {"sigmas": torch.linspace(1, 1 / num_steps, num_steps).tolist()}


def name_block(
    original: str, block: str, layers: Mapping[str, tuple[str, ...]]
) -> dict[str, Original]:
    """The layers of a block by their original names: {original name in the block: diffusers' names in
    its block, whose weights are joined there}."""
    return {
        f"{original}.{name}": Original(tuple(f"{block}.{layer}" for layer in own))
        for name, own in layers.items()
    }


def make_scheduler(scheduler: Any) -> FlowMatchEulerDiscreteScheduler:
    """A fresh scheduler of one's configuration."""
    # A pair only where it is asked for the settings that it does not take.
    return cast(
        FlowMatchEulerDiscreteScheduler,
        FlowMatchEulerDiscreteScheduler.from_config(scheduler.config),
    )


def sigma_table(scheduler: Any) -> torch.Tensor:
    """The sigmas of training, [num_train_timesteps], the most noise first."""
    return cast(torch.Tensor, make_scheduler(scheduler).sigmas)


def shift_of(config: Any, positions: int) -> float | None:
    """How far dynamic shifting moves the steps of pictures of so many positions, as diffusers'
    pipelines take it: on the line through the two that the configuration gives; None without it."""
    if not config.use_dynamic_shifting:
        return None
    fewest, most = config.base_image_seq_len, config.max_image_seq_len
    slope = (config.max_shift - config.base_shift) / (most - fewest)
    return config.base_shift + slope * (positions - fewest)
