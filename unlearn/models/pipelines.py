"""Pipelines and their one seam: what a family's denoiser is trained to predict, which weights are
selected, and how weights are changed and restored."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import hf_hub_download
from transformers.utils import logging as transformers_logging

from ..datasets.settings import LARGEST_NUMBERS
from ..errors import UserError
from ..runtime.programs import is_out_of_memory
from ..storage.hashes import digest, hash_tensors, named_weights
from ..storage.reading import read_json
from . import lora as loras
from .checks import PARTS, check_classes, check_fit, check_passes, check_pipeline
from .parts import parts_of
from .passes import replace_feed_forward
from .text_attention import KeysValues, project_text, share_texts
from .unets import check_unet_folder, load_unet
from .weights import find_absent

SELECTIONS = {  # of a UNet's parameters, by name
    "cross-attn-kv": r"\.attn2\.to_[kv]\.",
    "cross-attn": r"\.attn2\.",
    "attn": r"\.attn[12]\.",
    "all": r"",
    loras.SELECTION: loras.MATRICES,
}
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


@dataclass
class Model:
    """A diffusers pipeline in evaluation mode on one device, with what the losses ask of it."""

    pipeline: DiffusionPipeline
    weights_hash: str  # of denoiser, text encoder and VAE as loaded
    alpha_bars: torch.Tensor = field(repr=False)  # [num_train_timesteps] float32, on the device
    lora: tuple[tuple[str, float], ...] = ()  # hash and weight of each that changes the pipeline

    @property
    def denoiser(self) -> UNet2DConditionModel:
        """The UNet."""
        return self.pipeline.unet

    @property
    def device(self) -> torch.device:
        """Where the denoiser is."""
        return self.denoiser.device

    @property
    def prediction_type(self) -> str:
        """epsilon, sample or v_prediction, by the scheduler's configuration."""
        return self.pipeline.scheduler.config.prediction_type

    @property
    def identity(self) -> dict:
        """Identity fields of every loss: LoRA, where there is any, weights, noise schedule,
        prediction type."""
        return {
            **({"lora": [list(each) for each in self.lora]} if self.lora else {}),
            "weights": self.weights_hash,
            "prediction_type": self.prediction_type,
            "schedule": digest([self.pipeline.scheduler.config.get(key) for key in SCHEDULE_KEYS]),
        }

    @property
    def own_resolution(self) -> int | None:
        """Pixels of a side of the pictures that it was trained on, None where its configuration
        does not say."""
        return trained_resolution(self.denoiser.config, self.pipeline.vae.config)

    def resolution(self, settings: dict) -> int:
        """Pixels of a side of the square that pictures are brought to: the data root's, else the
        model's own. Raises UserError where neither says."""
        if not (resolution := settings["resolution"] or self.own_resolution):
            raise UserError(
                f"resolution: the UNet's config.json does not say it (sample_size is "
                f"{self.denoiser.config.get('sample_size')!r:.40}); "
                "give `resolution` in the data root's dataset.json"
            )
        return resolution

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """(C, h, w) of the latents of a square image of `resolution` pixels."""
        size = resolution // self.pipeline.vae_scale_factor
        if not size:
            raise UserError(
                f"resolution {resolution}: expected at least {self.pipeline.vae_scale_factor}, "
                f"the pixels of one latent"
            )
        return self.denoiser.config["in_channels"], size, size

    @property
    def embedding_shape(self) -> tuple[int, int]:
        """(tokens, features) of a prompt's embedding."""
        return (
            self.pipeline.tokenizer.model_max_length,
            self.pipeline.text_encoder.config.hidden_size,
        )

    def diffuse(
        self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """Noisy latents sqrt(alpha_bar) x + sqrt(1 - alpha_bar) epsilon at each sample's
        timestep."""
        alpha_bar = self.alpha_bars[timesteps][:, None, None, None]
        return alpha_bar.sqrt() * latents + (1 - alpha_bar).sqrt() * noise

    def target(
        self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """What the denoiser is trained to predict of these noisy latents."""
        return TARGETS[self.prediction_type](
            self.alpha_bars[timesteps][:, None, None, None], latents, noise
        )

    def predict(
        self,
        noisy: torch.Tensor,
        timesteps: torch.Tensor,
        embeddings: torch.Tensor,
        keys_values: KeysValues | None = None,
    ) -> torch.Tensor:
        """The denoiser's prediction. embeddings: [texts, tokens, features], each of as many
        successive samples as there are samples a text; keys_values: theirs
        (`text_attention.project_text`), where they are known."""
        keys_values = (
            project_text(self.denoiser, embeddings) if keys_values is None else keys_values
        )
        return self.denoiser(
            noisy,
            timesteps,
            encoder_hidden_states=embeddings,
            cross_attention_kwargs={"keys_values": keys_values},
        ).sample


def trained_resolution(unet: Mapping[str, Any], vae: Mapping[str, Any]) -> int | None:
    """Pixels of a side by the configurations of UNet and VAE, as diffusers' pipelines take it; None
    where they do not say."""
    size, blocks = unet.get("sample_size"), vae.get("block_out_channels")
    size = (
        size[0]
        if isinstance(size, (list, tuple)) and size and size == size[:1] * len(size)
        else size
    )
    if not isinstance(size, int) or isinstance(size, bool) or not isinstance(blocks, (list, tuple)):
        return None
    resolution = size * 2 ** (len(blocks) - 1)
    return resolution if 0 < resolution <= LARGEST_NUMBERS["resolution"] else None


def load_model(
    name: str | Path,
    device: torch.device | str,
    unet: str | None = None,
    trained: bool = True,
    lora: Sequence[str] = (),
    fuse_lora: bool = False,
) -> Model:
    """Loads a Stable Diffusion pipeline (folder or hub name), float32, safetensors only; with the
    UNet and schedule of the folder `unet` instead of its own where one is given (`load_unet`), and
    with LoRA files (FILE_OR_FOLDER[:WEIGHT]), whose matrices stand beside the UNet's weights, or are
    fused into them. Raises UserError where it cannot be loaded or is of a family or prediction type
    that is not known."""
    diffusers_logging.set_verbosity_error()
    transformers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    unet, lora_files = unet or "", loras.read_files(lora, fuse_lora)
    if unet:
        check_unet_folder(unet)
    if Path(name).exists():
        check_pipeline(name, unet)
    parts = load_unet(unet, trained) if unet else {}
    if Path(name).exists():
        parts |= dict.fromkeys(find_absent(Path(name)))
    try:
        if not Path(name).exists():  # before gigabytes are downloaded
            check_classes(
                name,
                read_json(hf_hub_download(str(name), "model_index.json"), "--sd_version"),
                unet,
            )
        pipeline = DiffusionPipeline.from_pretrained(
            name, use_safetensors=True, **{"safety_checker": None, **parts}
        ).to(dtype=torch.float32)
        if not all(getattr(pipeline, part, None) for part in PARTS):
            raise UserError(
                f"--sd_version {name}: {type(pipeline).__name__} has no UNet, VAE, text encoder "
                f"and tokenizer as Stable Diffusion does"
            )
        # Transformers makes up what a text encoder's file lacks: another model at every start.
        _, loading = type(pipeline.text_encoder).from_pretrained(
            name, subfolder="text_encoder", use_safetensors=True, output_loading_info=True
        )
    except UserError:
        raise
    except Exception as error:  # what the two libraries raise for a damaged file has no common type
        if is_out_of_memory(error):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"--sd_version {name}: cannot be loaded ({reason:.200})") from None
    check_fit(name, parts_of(pipeline), unet)
    parts = {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder, "vae": pipeline.vae}
    for label, part in parts.items():
        # Diffusers leaves what a file lacks without values.
        missing = {key for key, value in part.state_dict().items() if value.is_meta}
        if missing := sorted(
            missing.union(loading["missing_keys"]) if label == "text_encoder" else missing
        ):
            raise UserError(
                f"--sd_version {name}: its {label} lacks {len(missing)} weights, first {missing[0]}"
            )
        part.eval().requires_grad_(False)
    share_texts(pipeline.unet)
    replace_feed_forward(pipeline.unet)
    weights_hash = hash_tensors(
        {
            f"{name}.{key}": value
            for name, part in parts.items()
            for key, value in named_weights(part).items()
        }
    )
    applied = loras.apply(pipeline, lora_files, fuse_lora)
    weights_hash = digest(weights_hash, applied) if applied else weights_hash
    pipeline.to(device)
    pipeline.set_progress_bar_config(disable=True)
    alpha_bars = pipeline.scheduler.alphas_cumprod.float().to(device)
    model = Model(pipeline, weights_hash, alpha_bars, applied)
    check_passes(model, name)
    return model


def select_parameters(denoiser: torch.nn.Module, selection: str) -> dict[str, torch.nn.Parameter]:
    """The parameters of a selection, by name in the model's order. Raises UserError where none
    matches, or a LoRA stands beside the weights."""
    loras.check_selection(denoiser, selection)
    selected = {
        name: value
        for name, value in denoiser.named_parameters()
        if re.search(SELECTIONS[selection], name)
    }
    if not selected:
        raise UserError(
            f"--weight_selection {selection}: matches no parameter of {type(denoiser).__name__}"
        )
    return selected


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
