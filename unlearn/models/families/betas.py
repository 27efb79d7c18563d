"""Diffusion whose noise is added by a schedule of betas: what Stable Diffusion, its larger siblings
and PixArt have in common."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from diffusers import DDIMScheduler

from ...errors import UserError
from ...storage.hashes import digest
from .interface import Family, Parts, Refuse

# prediction type -> what the denoiser is trained to predict, from alpha-bar, latents and noise
TARGETS = {
    "epsilon": lambda alpha_bar, latents, noise: noise,
    "sample": lambda alpha_bar, latents, noise: latents,
    "v_prediction": lambda alpha_bar, latents, noise: (
        alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * latents
    ),
}
SCHEDULE_KEYS = (
    "num_train_timesteps",
    "beta_schedule",
    "beta_start",
    "beta_end",
    "trained_betas",
    "rescale_betas_zero_snr",
)


class Betas(Family):
    """A family whose noisy latents are sqrt(alpha_bar) x + sqrt(1 - alpha_bar) epsilon; its levels
    are the alpha-bars."""

    predictions: Sequence[str] = ("epsilon", "sample", "v_prediction")

    def levels(self, scheduler: Any) -> torch.Tensor:
        return scheduler.alphas_cumprod.float()

    def prediction_type(self, scheduler: Any) -> str:
        return scheduler.config.prediction_type

    def identity(self, pipeline: Any) -> dict:
        config = pipeline.scheduler.config
        return {
            "prediction_type": self.prediction_type(pipeline.scheduler),
            "schedule": digest([config.get(key) for key in SCHEDULE_KEYS]),
        }

    def diffuse(
        self,
        levels: torch.Tensor,
        latents: torch.Tensor,
        noise: torch.Tensor,
        timesteps: torch.Tensor,
    ) -> torch.Tensor:
        alpha_bar = levels[timesteps][:, None, None, None]
        return alpha_bar.sqrt() * latents + (1 - alpha_bar).sqrt() * noise

    def target(
        self,
        prediction_type: str,
        levels: torch.Tensor,
        latents: torch.Tensor,
        noise: torch.Tensor,
        timesteps: torch.Tensor,
    ) -> torch.Tensor:
        return TARGETS[prediction_type](levels[timesteps][:, None, None, None], latents, noise)

    def check_schedule(self, parts: Parts, refuse: Refuse) -> None:
        """The part of `check_fit` that concerns the scheduler."""
        scheduler, name = parts.scheduler, type(parts.scheduler).__name__
        alpha_bars = getattr(scheduler, "alphas_cumprod", None)
        if not isinstance(alpha_bars, torch.Tensor):
            refuse(
                f"its scheduler, {name}, has no "
                f"alphas_cumprod{', because it matches flows' if 'Flow' in name else ''}; supported "
                f"are those of noise that is added by a schedule of betas, such as DDPMScheduler"
            )
        if (
            not isinstance(kind := scheduler.config.get("prediction_type", "epsilon"), str)
            or kind not in self.predictions
        ):
            refuse(
                f"unknown prediction type {kind!s:.80}; expected one of "
                f"{', '.join(self.predictions)}"
            )
        if len(alpha_bars) != (count := scheduler.config.get("num_train_timesteps")):
            refuse(
                f"its scheduler has {len(alpha_bars)} noise levels (trained_betas) for "
                f"{count!s:.20} timesteps (num_train_timesteps)"
            )
        if not ((alpha_bars >= 0) & (alpha_bars <= 1)).all():  # so written, NaN is refused
            refuse(
                "its scheduler's noise levels (alphas_cumprod) are not all between 0 and 1: its "
                "betas are damaged"
            )

    def sampler(
        self, pipeline: Any, num_steps: int, latent_shape: Sequence[int] = ()
    ) -> DDIMScheduler:
        """Deterministic DDIM on the model's own schedule."""
        # A pair only where it is asked for the settings that it does not take.
        scheduler = cast(
            DDIMScheduler,
            DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False),
        )
        scheduler.set_timesteps(num_steps)
        return scheduler

    def check_steps(self, pipeline: Any, num_steps: int) -> None:
        count = len(self.levels(pipeline.scheduler))
        if (
            not 1 <= num_steps <= count
            or int(self.sampler(pipeline, num_steps).timesteps.max()) >= count
        ):
            raise UserError(f"--num_inference_steps {num_steps}: expected 1 to fewer than {count}")
        if (
            self.prediction_type(pipeline.scheduler) == "epsilon"
            and not self.sampler(pipeline, num_steps).alphas_cumprod.all()
        ):
            raise UserError(
                "the model's last timestep is noise alone (rescale_betas_zero_snr), and it predicts "
                "the noise (epsilon): no picture "
                "follows from that. If it was trained to predict v, as models with such a schedule "
                'are, write "prediction_type": '
                '"v_prediction" into its scheduler_config.json'
            )
