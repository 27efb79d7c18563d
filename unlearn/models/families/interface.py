"""What the core asks of a family of models. All that differs from one family to another stands in
its module, and nothing else does: the core knows no family by its name."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import torch

from ...datasets.conditioning import Conditioning
from ..text_weights import KeysValues, TextWeights

Refuse = Callable[[str], NoReturn]
KV = "cross-attn-kv"
UNET_SELECTIONS = {  # of a UNet's parameters, by name
    "cross-attn-kv": r"\.attn2\.to_[kv]\.",
    "cross-attn": r"\.attn2\.",
    "attn": r"\.attn[12]\.",
    "all": r"",
}
UNET_TARGETS = {
    "attention": r"\.attn[12]\.to_(q|k|v|out\.0)$",  # as diffusers' training scripts choose
    # as kohya's does
    "linear": r"\.attn[12]\.to_(q|k|v|out\.0)$|\.ff\.net\.(0\.proj|2)$|\.proj_(in|out)$",
}


class Tokens(NamedTuple):
    """What a tokenizer says of itself."""

    limit: Any  # tokens of a prompt; None where it does not say
    vocabulary: Any  # tokens that it numbers itself, without added ones; 0 where it does not say


class Parts(NamedTuple):
    """What the parts of a pipeline say of themselves."""

    family: "Family"
    classes: dict[str, str]  # part -> name of its class
    denoiser: dict  # configurations
    vae: dict
    texts: dict[str, dict]  # text encoder -> what is asked of its configuration
    tokens: dict[str, Tokens]  # by tokenizer
    scheduler: Any


class Original(NamedTuple):
    """A layer of a denoiser as its authors' own code has it, whose names many LoRA files use."""

    layers: tuple[str, ...]  # of diffusers' denoiser: their weights, one under the other, are its
    is_swapped: bool = False  # its two halves stand the other way round


class Family:
    """One family. It has no state: pipelines, configurations and tensors are handed to it."""

    name: str  # as messages name it
    denoiser: str  # the part of a pipeline that predicts
    classes: Mapping[str, tuple[str, ...]]  # of parts, that can be used
    encoders: Mapping[str, str]  # text encoder -> its tokenizer
    optional: tuple[str, ...] = ()  # parts that a pipeline may lack
    can_be_customized: bool = False  # by custom diffusion's K, V and tokens
    learns_words: bool = False  # whether its text encoders take new words' embeddings
    follows_clip_skip: bool = False  # whether trainers may read another layer of its text encoder
    encoders_in_files: Mapping[str, str] = {}  # text encoder -> its name in files of all parts
    unprojected: tuple[str, ...] = ()  # text encoders whose projection the authors' code leaves out
    selections: Mapping[str, str]  # weight selection -> regular expression of parameters' names
    text: TextWeights  # how the weights of the text's keys and values are reached
    longest: int | None = None  # tokens of a prompt that are read, where tokenizers may say more

    def parts(self, classes: Mapping[str, str]) -> list[str]:
        """The parts that a pipeline of these classes must have."""
        parts = (self.denoiser, "vae", *self.encoders, *self.encoders.values())
        return [part for part in parts if part in classes or part not in self.optional]

    def owns(self, pipeline: str, classes: Mapping[str, str]) -> bool:
        """Whether a pipeline of this class, whose parts are of these classes, is of this family."""
        raise NotImplementedError

    def check_classes(self, classes: Mapping[str, str], refuse: Refuse) -> None:
        """Refuses a pipeline by what its index names alone."""

    def check_fit(self, parts: Parts, which: str, refuse: Refuse) -> None:
        """Refuses parts that do not fit each other. which: the denoiser, as messages name it."""
        raise NotImplementedError

    def load_tokenizers(self, name: Any, classes: Mapping[str, str]) -> dict[str, Any]:
        """Tokenizers of a pipeline (folder or hub name, its parts of these classes) that stand for
        what its index names, by part."""
        return {}

    def prepare(self, denoiser: Any) -> None:
        """Changes a denoiser that was loaded to one that the core can use, in place."""
        self.text.prepare(denoiser, self.selections[KV])

    def unread(self, denoiser: Any) -> str | None:
        """A regular expression of the names of a denoiser's parameters on which no prediction depends,
        None where all matter. Where one has its own curvature, it is 0 / 0."""
        return None

    def before_text(self, denoiser: Any) -> list[Any]:
        """The costly ones of the modules that run once a pass, before the first that reads the
        text: what they give is the same under any weights of keys and values."""
        return []

    # Noise: `levels` says how noisy each training timestep is.

    def levels(self, scheduler: Any) -> torch.Tensor:
        """How noisy each training timestep is, [num_train_timesteps] float32."""
        raise NotImplementedError

    def prediction_type(self, scheduler: Any) -> str:
        """What the denoiser predicts, in a word."""
        raise NotImplementedError

    def identity(self, pipeline: Any) -> dict:
        """Identity fields of every loss, besides the weights."""
        raise NotImplementedError

    def diffuse(
        self,
        levels: torch.Tensor,
        latents: torch.Tensor,
        noise: torch.Tensor,
        timesteps: torch.Tensor,
    ) -> torch.Tensor:
        """Noisy latents at each sample's timestep, [batch] int64."""
        raise NotImplementedError

    def target(
        self,
        prediction_type: str,
        levels: torch.Tensor,
        latents: torch.Tensor,
        noise: torch.Tensor,
        timesteps: torch.Tensor,
    ) -> torch.Tensor:
        """What the denoiser is trained to predict of these noisy latents."""
        raise NotImplementedError

    def weight(self, levels: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor | None:
        """What training multiplies the squared error of each sample with, [batch]; None: 1."""
        return None

    def times(self, levels: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """What the denoiser is told of training timesteps, [batch] int64."""
        return timesteps

    # The denoiser.

    def inputs(
        self,
        denoiser: Any,
        noisy: torch.Tensor,
        times: torch.Tensor,
        conditioning: Conditioning,
        keys_values: KeysValues | None = None,
    ) -> dict[str, Any]:
        """The arguments of a denoiser's pass. conditioning: of as many successive samples as there
        are samples a text; keys_values: its text's, where they are known."""
        raise NotImplementedError

    def read(self, output: torch.Tensor, noisy: torch.Tensor) -> torch.Tensor:
        """The prediction, [batch, C, h, w], of a pass's output."""
        return output

    rounded: tuple[str, ...] = (
        "sample",
        "hidden_states",
        "encoder_hidden_states",
        "pooled_projections",
        "text_embeds",
    )  # arguments of a pass that have the precision of the denoiser's weights; times and sizes stay

    def latent_channels(self, parts: Parts) -> int:
        """Channels of a latent."""
        return parts.vae["latent_channels"]

    patch: int = 1  # pixels of a latent's side that the denoiser takes as one

    def most_latents(self, denoiser: Mapping[str, Any]) -> int | None:
        """Latents of a side that the denoiser can take at most, by its configuration."""
        return None

    def own_latent_side(self, denoiser: Mapping[str, Any]) -> Any:
        """Side of the latents that it was trained on, by the denoiser's configuration."""
        return denoiser.get("sample_size")

    # LoRA.

    # text encoders by the words of kohya's and OneTrainer's files
    trainers_encoders: Mapping[str, str] = {
        "te": "text_encoder",
        "te1": "text_encoder",
        "te2": "text_encoder_2",
        "te3": "text_encoder_3",
    }
    # layers that get matrices where a LoRA is trained, regular expressions of their names
    lora_targets: Mapping[str, str] = UNET_TARGETS

    def originals(self, denoiser: Any) -> dict[str, Original]:
        """The layers of a denoiser as its authors' own code names and joins them, by that name; those
        that this one lacks may be among them."""
        return {}

    def original_tensors(self, denoiser: Any) -> dict[str, str]:
        """A denoiser's weights beside those of its layers, by their names in its authors' code where
        these are others than diffusers'."""
        return {}

    def spare_tensors(self, denoiser: Any) -> dict[str, tuple[int | None, ...]]:
        """What its authors' files have beside a denoiser's weights, which diffusers computes or never
        reads: {name: shape, None for any size}. A shape that differs tells of another model."""
        return {}

    # Pictures and prompts.

    def pixels_a_latent(self, vae: Mapping[str, Any]) -> int | None:
        """Pixels of a latent's side by a VAE's configuration; None where it does not say."""
        blocks = vae.get("block_out_channels")
        return 2 ** (len(blocks) - 1) if isinstance(blocks, (list, tuple)) and blocks else None

    def encode_pixels(self, vae: Any, pixels: torch.Tensor) -> torch.Tensor:
        """A VAE's latents, [n, C, h, w], of pixels, [n, 3, H, W]: the posterior's mean."""
        return vae.encode(pixels).latent_dist.mean

    def decode_latents(self, vae: Any, latents: torch.Tensor) -> torch.Tensor:
        """A VAE's pixels, [n, 3, H, W], of latents as it gives them, [n, C, h, w]."""
        return vae.decode(latents).sample

    def scaling(self, vae: Any) -> list:
        """What a VAE's configuration says of the normalisation of latents, for records."""
        return [vae.config.scaling_factor, vae.config.get("shift_factor")]

    def normalise(self, vae: Any, latents: Any) -> Any:
        """Latents of a VAE as the denoiser expects them."""
        config = vae.config
        return (latents - (config.get("shift_factor") or 0)) * config.scaling_factor

    def denormalise(self, vae: Any, latents: Any) -> Any:
        """Latents as the VAE gave them."""
        config = vae.config
        return latents / config.scaling_factor + (config.get("shift_factor") or 0)

    def encode_prompts(self, pipeline: Any, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        """Conditioning of prompts, {name: [n, ...]} float32 on the CPU."""
        raise NotImplementedError

    # whether embeddings of a training set stand on the disk image by image, as they were published,
    # and not once for each different caption
    is_stored_by_image: bool = False

    def text_lengths(self, pipeline: Any, prompts: Sequence[str]) -> list[int] | None:
        """How many tokens each prompt's text has before the zeros that it is filled up with; None
        where it is filled up with others."""
        return None

    def tokenize(self, pipeline: Any, prompts: Sequence[str]) -> dict[str, list[list[int]]]:
        """The tokens that are read of prompts, by tokenizer, for records."""
        raise NotImplementedError

    def reader(self, pipeline: Any) -> tuple[Any, int]:
        """The tokenizer that reads the most of a prompt, and how many tokens of it."""
        return pipeline.tokenizer, pipeline.tokenizer.model_max_length

    of_sizes: Sequence[str] = ()  # conditioning that belongs to a picture's size, not to its prompt

    def encode_sizes(
        self, pipeline: Any, sizes: Sequence[tuple[int, int]], resolution: int
    ) -> dict[str, torch.Tensor]:
        """Conditioning that belongs to pictures, {name: [n, ...]} float32. sizes: (width, height)
        of each before it is cropped; resolution: pixels of the square's side."""
        return {}

    def shapes(self, parts: Parts) -> dict[str, tuple[int, ...]]:
        """Shapes of a text's conditioning, {name: shape}; the text's own first, under TEXT."""
        raise NotImplementedError

    # Pictures made.

    def guide(
        self, pipeline: Any, conditioning: Conditioning, guidance_scale: float
    ) -> tuple[Conditioning, Conditioning | None]:
        """How pictures are made under guidance: the conditioning of a pass, and that of the empty
        prompt where each step takes a second pass, else None. Raises UserError where there is no
        such guidance."""
        if guidance_scale == 1:
            return conditioning, None
        empty = self.encode_empty(pipeline)
        return conditioning, {
            name: empty[name].to(tensor).expand_as(tensor) if name in empty else tensor
            for name, tensor in conditioning.items()
        }

    def mix(
        self, prediction: torch.Tensor, empty: torch.Tensor, guidance_scale: float
    ) -> torch.Tensor:
        """The prediction that a step takes, from those of the text and of the empty prompt."""
        return empty + guidance_scale * (prediction - empty)

    def encode_empty(self, pipeline: Any) -> dict[str, torch.Tensor]:
        """The conditioning that guidance leads away from, {name: [1, ...]}."""
        return self.encode_prompts(pipeline, [""])

    def check_steps(self, pipeline: Any, num_steps: int) -> None:
        """Raises UserError where a model cannot sample in so many steps."""
        raise NotImplementedError

    def sampler(self, pipeline: Any, num_steps: int, latent_shape: Sequence[int]) -> Any:
        """A scheduler of diffusers that is set to so many deterministic steps."""
        raise NotImplementedError
