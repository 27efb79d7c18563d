"""A pipeline that was loaded, with what losses, gradients and pictures ask of it; what differs by
family it asks of its own."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

import torch
from diffusers import DiffusionPipeline

from ..datasets.conditioning import Conditioning
from ..datasets.settings import LARGEST_NUMBERS
from ..errors import UserError
from ..storage.hashes import hash_tensors, named_weights
from .checkpointing import checkpoint_gradients
from .checks import part_name
from .families import Family, Parts
from .parts import parts_of
from .precision import DTYPES, cast_inputs
from .residence import Residence
from .text_weights import KeysValues


@dataclass(eq=False)
class Model:
    """A diffusers pipeline in evaluation mode on one device."""

    pipeline: DiffusionPipeline
    weights_hash: str  # of denoiser, text encoders and VAE as loaded
    # [num_train_timesteps] float32, on the device: how noisy each training timestep is, alpha-bar or
    # sigma as the family says
    levels: torch.Tensor = field(repr=False)
    family: Family
    lora: tuple[tuple[str, float], ...] = ()  # hash and weight of each that changes the pipeline
    weights: str = "fp32"  # precision of those that are never changed: of `precision.DTYPES`
    residence: Residence | None = field(default=None, repr=False)  # None: its parts never move

    @property
    def denoiser(self) -> Any:
        """The part that predicts: a UNet or a transformer."""
        return getattr(self.pipeline, self.family.denoiser)

    @property
    def device(self) -> torch.device:
        """Where passes are made."""
        return self.residence.device if self.residence else self.denoiser.device

    def encoding(self) -> AbstractContextManager[None]:
        """Within it pictures and prompts may be encoded one after the other, and no pass made: what
        encodes them may take the denoiser's place on the device."""
        return self.residence.encoding() if self.residence else nullcontext()

    def encoders_there(self) -> AbstractContextManager[None]:
        """Within it VAE and text encoders are on the device, and no pass is made."""
        return self.residence.visited() if self.residence else nullcontext()

    def save_memory(self) -> bool:
        """Lets passes keep less for their gradients and compute it again (gradient checkpointing),
        with the same results; False where they do so already, or cannot."""
        return checkpoint_gradients(self.denoiser)

    @property
    def is_saving_memory(self) -> bool:
        """Whether `save_memory` was done."""
        return getattr(self.denoiser, "is_gradient_checkpointing", False)

    @property
    def alpha_bars(self) -> torch.Tensor:
        """The levels of a family whose noise is added by betas."""
        return self.levels

    @property
    def num_train_timesteps(self) -> int:
        """How many timesteps it was trained on."""
        return len(self.levels)

    @property
    def prediction_type(self) -> str:
        """What it predicts: epsilon, sample, v_prediction or flow."""
        return self.family.prediction_type(self.pipeline.scheduler)

    @property
    def identity(self) -> dict:
        """Identity fields of every loss: LoRA, where there is any, weights, noise schedule,
        prediction type, and what else a family's losses depend on."""
        return {
            **({"lora": [list(each) for each in self.lora]} if self.lora else {}),
            **({"weights_precision": self.weights} if self.weights != "fp32" else {}),
            "weights": self.weights_hash,
            **self.family.identity(self.pipeline),
        }

    @cached_property
    def parts(self) -> Parts:
        """What its parts say of themselves."""
        return parts_of(self.pipeline, self.family)

    @property
    def own_resolution(self) -> int | None:
        """Pixels of a side of the pictures that it was trained on, None where its configuration
        does not say."""
        return trained_resolution(self.family, self.denoiser.config, self.pipeline.vae.config)

    def resolution(self, settings: dict) -> int:
        """Pixels of a side of the square that pictures are brought to: the data root's, else the
        model's own. Raises UserError where neither says, or the denoiser cannot take it."""
        if not (resolution := settings["resolution"] or self.own_resolution):
            raise UserError(
                f"resolution: the {part_name(self.family)}'s config.json does not say it (sample_size is "
                f"{self.denoiser.config.get('sample_size')!r:.40}); "
                "give `resolution` in the data root's dataset.json"
            )
        self.latent_shape(resolution)
        return resolution

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """(C, h, w) of the latents of a square image of `resolution` pixels."""
        factor, patch = self.pipeline.vae_scale_factor, self.family.patch
        size = resolution // factor
        if not size:
            raise UserError(
                f"resolution {resolution}: expected at least {factor}, the pixels of one latent"
            )
        if size % patch:
            raise UserError(
                f"resolution {resolution}: expected a multiple of {factor * patch}, because "
                f"{self.family.name} takes {patch} x {patch} latents as one"
            )
        most = self.family.most_latents(self.denoiser.config)
        if most is not None and size > most:
            raise UserError(
                f"resolution {resolution}: expected at most {most * factor}, as the "
                f"{part_name(self.family)} has positions"
            )
        return self.family.latent_channels(self.parts), size, size

    @property
    def conditioning_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of a text's conditioning, {name: shape}."""
        return self.family.shapes(self.parts)

    @property
    def embedding_shape(self) -> tuple[int, int]:
        """(tokens, features) of a prompt's embedding."""
        tokens, features = next(iter(self.conditioning_shapes.values()))
        return tokens, features

    @torch.no_grad()
    def encode_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        """Latents [n, C, h, w] float32 on the CPU of pixels [n, 3, H, W]: the posterior's mean,
        normalised for the denoiser. The mean, not a sample: losses before and after unlearning must
        differ by the model alone."""
        vae: Any = self.pipeline.vae
        with self.encoders_there():
            latents = self.family.encode_pixels(vae, pixels.to(vae.device, vae.dtype)).float()
            return self.family.normalise(vae, latents).cpu()

    def denormalise(self, latents: Any) -> Any:
        """Latents as the VAE gives them."""
        return self.family.denormalise(self.pipeline.vae, latents)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        """Conditioning of prompts, {name: [n, ...]} float32 on the CPU."""
        with self.encoders_there():
            return self.family.encode_prompts(self.pipeline, prompts)

    @property
    def is_stored_by_image(self) -> bool:
        """Whether embeddings of a training set stand on the disk image by image, as published."""
        return self.family.is_stored_by_image

    @property
    def has_half_texts(self) -> bool:
        """Whether all of its text encoders compute in bfloat16."""
        encoders = (getattr(self.pipeline, name) for name in self.encoders)
        return all(encoder.dtype == torch.bfloat16 for encoder in encoders)

    def text_lengths(self, prompts: Sequence[str]) -> list[int]:
        """How many tokens each prompt's text has before the zeros that it is filled up with."""
        lengths = self.family.text_lengths(self.pipeline, prompts)
        return [self.embedding_shape[0]] * len(prompts) if lengths is None else lengths

    @property
    def of_sizes(self) -> Sequence[str]:
        """Names of the conditioning that belongs to a picture's size, not to its prompt."""
        return [name for name in self.family.of_sizes if name in self.conditioning_shapes]

    def encode_sizes(
        self, sizes: Sequence[tuple[int, int]], resolution: int
    ) -> dict[str, torch.Tensor]:
        """Conditioning that belongs to pictures of these (width, height)."""
        return self.family.encode_sizes(self.pipeline, sizes, resolution)

    def tokenize(self, prompts: Sequence[str]) -> dict[str, list[list[int]]]:
        """The tokens that are read of prompts, by tokenizer."""
        return self.family.tokenize(self.pipeline, prompts)

    @property
    def reader(self) -> tuple[Any, int]:
        """The tokenizer that reads the most of a prompt, and how many tokens of it."""
        return self.family.reader(self.pipeline)

    @property
    def word_reader(self) -> Any:
        """The tokenizer that knows new words, whatever others read: the first."""
        return cast(Any, self.pipeline).tokenizer

    @property
    def encoding_identity(self) -> dict:
        """What latents and conditioning depend on besides pictures and captions, for records."""
        pipeline: Any = self.pipeline
        parts = {part: named_weights(getattr(pipeline, part)) for part in ("vae", *self.encoders)}
        return {
            "scaling": self.family.scaling(pipeline.vae),
            **{name: hash_tensors(weights) for name, weights in parts.items()},
        }

    @property
    def encoders(self) -> list[str]:
        """The text encoders that its pipeline has."""
        return [part for part in self.family.encoders if getattr(self.pipeline, part, None)]

    def diffuse(
        self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """Noisy latents at each sample's timestep, [batch] int64."""
        return self.family.diffuse(self.levels, latents, noise, timesteps)

    def target(
        self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """What the denoiser is trained to predict of these noisy latents."""
        return self.family.target(self.prediction_type, self.levels, latents, noise, timesteps)

    def predict(
        self,
        noisy: torch.Tensor,
        timesteps: torch.Tensor,
        conditioning: Conditioning,
        keys_values: KeysValues | None = None,
    ) -> torch.Tensor:
        """The denoiser's prediction, [batch, C, h, w]. timesteps: [batch] int64; conditioning:
        {name: [texts, ...]}, each of as many successive samples as there are samples a text;
        keys_values: its text's, where they are known."""
        times = self.family.times(self.levels, timesteps)
        return self.predict_at(noisy, times, conditioning, keys_values)

    def arguments(
        self,
        noisy: torch.Tensor,
        times: torch.Tensor,
        conditioning: Conditioning,
        keys_values: KeysValues | None = None,
    ) -> dict[str, Any]:
        """The arguments of a pass of the denoiser, in the precision of its weights; see
        `predict_at`."""
        inputs = self.family.inputs(self.denoiser, noisy, times, conditioning, keys_values)
        if self.weights == "fp32":
            return inputs
        return cast_inputs(inputs, self.family.rounded, DTYPES[self.weights])

    def read(self, output: torch.Tensor, noisy: torch.Tensor) -> torch.Tensor:
        """The prediction, [batch, C, h, w], of a pass's output; float32 where the weights are not."""
        return self.family.read(output if self.weights == "fp32" else output.float(), noisy)

    def predict_at(
        self,
        noisy: torch.Tensor,
        times: torch.Tensor,
        conditioning: Conditioning,
        keys_values: KeysValues | None = None,
    ) -> torch.Tensor:
        """`predict` at what the denoiser is told of timesteps, which sampling may take between those
        of training."""
        if keys_values is None:
            keys_values = self.family.text.keys_values(self.denoiser, conditioning)
        inputs = self.arguments(noisy, times, conditioning, keys_values)
        return self.read(self.denoiser(**inputs).sample, noisy)


def trained_resolution(
    family: Family, denoiser: Mapping[str, Any], vae: Mapping[str, Any]
) -> int | None:
    """Pixels of a side by the configurations of denoiser and VAE, as diffusers' pipelines take it;
    None where they do not say."""
    size, pixels = family.own_latent_side(denoiser), family.pixels_a_latent(vae)
    size = (
        size[0]
        if isinstance(size, (list, tuple)) and size and size == size[:1] * len(size)
        else size
    )
    if not isinstance(size, int) or isinstance(size, bool) or pixels is None:
        return None
    resolution = size * pixels
    return resolution if 0 < resolution <= LARGEST_NUMBERS["resolution"] else None
