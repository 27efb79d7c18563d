"""Checks that several families make of the parts of a pipeline."""

import math
from collections.abc import Mapping
from typing import Any

from .interface import Parts, Refuse


def guess_unet(given: object, made: object, latent: int) -> str:
    """What a UNet probably is that takes `given` channels and gives `made`, where latents have
    `latent`."""
    kinds = {
        2 * latent + 1: "an inpainting UNet",
        2 * latent: "the UNet of InstructPix2Pix or of a latent upscaler",
        latent + 3: "an upscaler's UNet",
        latent + 1: "a depth-to-image UNet",
    }
    if given == latent and made == 2 * latent:
        return "a UNet that predicts variances too (learned sigma)"
    return next(
        (kind for number, kind in kinds.items() if number == given),
        "UNet and VAE of different models",
    )


def check_channels(parts: Parts, which: str, refuse: Refuse) -> None:
    """Refuses a UNet that does not take and give latents of its VAE."""
    latent = parts.vae.get("latent_channels")
    given, made = parts.denoiser.get("in_channels"), parts.denoiser.get("out_channels")
    if not isinstance(latent, int) or not given == made == latent:
        guess = (
            guess_unet(given, made, latent)
            if isinstance(latent, int)
            else "parts of different models"
        )
        refuse(
            f"{which} takes {given!s:.20} channels and gives {made!s:.20}, its VAE's latents "
            f"have {latent!s:.20} (probably {guess}); "
            "expected one number: a UNet that makes pictures from text alone"
        )
    check_colours(parts, refuse)


def check_colours(parts: Parts, refuse: Refuse) -> None:
    """Refuses a VAE of other than coloured pictures."""
    if (colours := (parts.vae.get("in_channels"), parts.vae.get("out_channels"))) != (3, 3):
        refuse(
            f"its VAE takes {colours[0]!s:.20} channels and gives {colours[1]!s:.20}; expected "
            f"3, a picture's"
        )


def check_scaling(parts: Parts, refuse: Refuse) -> None:
    """Refuses a VAE whose latents have no scale."""
    scaling = parts.vae.get("scaling_factor")
    if (
        not isinstance(scaling, (int, float))
        or isinstance(scaling, bool)
        or not 0 < scaling < math.inf
    ):
        refuse(f"its VAE's scaling_factor: expected a number, found {scaling!r:.80}")


def check_transformer(
    parts: Parts, which: str, expected: Mapping[str, tuple[Any, str]], refuse: Refuse
) -> None:
    """Refuses a transformer whose numbers do not fit. expected: {key of its configuration: (number,
    whose it is)}."""
    for key, (number, whose) in expected.items():
        if (found := parts.denoiser.get(key)) != number:
            refuse(
                f"{which} has {key} {found!s:.20}, {whose} {number!s:.20}: they are of different "
                f"models, or it takes more than a text"
            )
