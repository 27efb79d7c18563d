"""Families of models, one module each: `interface.Family` says what the core asks of one."""

from collections.abc import Mapping

from .flux import Flux
from .flux_2 import Flux2, Flux2Dev
from .interface import Family, Parts
from .lumina2 import Lumina2
from .pixart import PixArt
from .qwen_image import QwenImage
from .sana import Sana
from .stable_diffusion import StableDiffusion
from .stable_diffusion_3 import StableDiffusion3
from .stable_diffusion_xl import StableDiffusionXL
from .z_image import ZImage

STABLE_DIFFUSION = StableDiffusion()
FAMILIES: tuple[Family, ...] = (
    STABLE_DIFFUSION,
    StableDiffusionXL(),
    StableDiffusion3(),
    Flux(),
    PixArt("PixArt-alpha", "PixArtAlphaPipeline", 120),
    PixArt("PixArt-sigma", "PixArtSigmaPipeline", 300),
    QwenImage(),
    Flux2("FLUX.2-klein", "Flux2KleinPipeline", "Qwen3ForCausalLM", (9, 18, 27)),
    Flux2Dev("FLUX.2-dev", "Flux2Pipeline", "Mistral3ForConditionalGeneration", (10, 20, 30)),
    ZImage(),
    Sana(),
    Lumina2(),
)
SUPPORTED = f"{', '.join(family.name for family in FAMILIES)} and models of their kind"

__all__ = ["FAMILIES", "STABLE_DIFFUSION", "SUPPORTED", "Family", "Parts", "find_family"]


def find_family(pipeline: str, classes: Mapping[str, str]) -> Family | None:
    """The family of a pipeline of this class whose parts are of these classes, {part: class}; None
    where it is not known."""
    return next((family for family in FAMILIES if family.owns(pipeline, classes)), None)


def find_denoiser_family(denoiser: object) -> Family:
    """The first family whose denoisers are of this one's class; what those that share one say of
    it is the same."""
    names = {each.__name__ for each in type(denoiser).__mro__}  # some get a class of our own
    return next(
        (family for family in FAMILIES if names & {*family.classes[family.denoiser]}), FAMILIES[0]
    )
