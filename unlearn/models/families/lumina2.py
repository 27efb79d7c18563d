"""Lumina2 (Lumina-Image 2.0 and its fine-tunes): Gemma 2 for the text, after a system prompt, and a
transformer over one sequence of text and image."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import Lumina2Transformer2DModel
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch.nn.functional import pad

from .checks import check_colours, check_scaling, check_transformer
from .flow import sigma_table
from .interface import Parts, Refuse
from .single_streams import SingleStream, image_ids, patchify, run_block, unpatchify
from .texts import check_tokens

# What stands before every prompt but the empty one of guidance. Source: diffusers' Lumina2Pipeline.
SYSTEM = (
    "You are an assistant designed to generate superior images with the superior degree of "
    "image-text alignment based on textual prompts or user prompts. <Prompt Start> "
)


class Lumina2(SingleStream):
    name = "Lumina2"
    classes = {
        "transformer": ("Lumina2Transformer2DModel",),
        "vae": ("AutoencoderKL",),
        "text_encoder": ("Gemma2Model", "Gemma2ForCausalLM"),
    }
    encoders_in_files = {"text_encoder": "gemma2_2b"}
    longest = 256
    renamed = {
        ".attn.": ".attention.",
        "attention.to_out.0": "attention.out",
        "attention.norm_q": "attention.q_norm",
        "attention.norm_k": "attention.k_norm",
        ".norm1.norm.": ".attention_norm1.",
        ".norm1.weight": ".attention_norm1.weight",  # of blocks that are not told the time
        ".norm2.": ".attention_norm2.",
        "feed_forward.linear_": "feed_forward.w",
        "norm1.linear": "adaLN_modulation.1",
        "norm_out.linear_1": "final_layer.adaLN_modulation.1",
        "norm_out.linear_2": "final_layer.linear",
        "time_caption_embed.caption_embedder": "cap_embedder",
        "time_caption_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "time_caption_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    }

    def owns(self, pipeline: str, classes: Mapping[str, str]) -> bool:
        return pipeline in ("Lumina2Pipeline", "Lumina2Text2ImgPipeline")  # its name before

    def prepare(self, denoiser: Any) -> None:
        super().prepare(denoiser)
        denoiser.__class__ = PaddedLumina2

    def check_fit(self, parts: Parts, which: str, refuse: Refuse) -> None:
        check_colours(parts, refuse)
        check_tokens(parts, "text_encoder", "tokenizer", refuse, self.longest)
        latent = parts.vae.get("latent_channels")
        width = parts.texts["text_encoder"]["hidden_size"]
        expected = {
            "in_channels": (latent, "its VAE's latents have"),
            "cap_feat_dim": (width, "its text encoder gives"),
            "patch_size": (self.patch, "expected"),
        }
        check_transformer(parts, which, expected, refuse)
        if (made := parts.denoiser.get("out_channels")) not in (None, latent):
            refuse(f"{which} takes {latent} channels and gives {made!s:.20}; expected {latent}")
        self.check_schedule(parts, refuse)
        check_scaling(parts, refuse)

    def most_latents(self, denoiser: Mapping[str, Any]) -> int:
        return self.patch * min(denoiser["axes_lens"][1:])

    # The training example takes a sigma of its scheduler's for the picture's share, not the noise's.

    def indices(self, num_train_timesteps: int) -> torch.Tensor:
        return super().indices(num_train_timesteps).flip(0)

    def levels(self, scheduler: Any) -> torch.Tensor:
        """The noise's share, 1 - sigma."""
        table = sigma_table(scheduler)
        return 1 - table[self.indices(len(table))].float()

    def wrap(self, prompts: Sequence[str]) -> list[str]:
        return [SYSTEM + prompt for prompt in prompts]

    def encode_empty(self, pipeline: Any) -> dict[str, torch.Tensor]:
        """The empty text, without the system prompt."""
        return self.encode_texts(pipeline, [""])

    def mix(
        self, prediction: torch.Tensor, empty: torch.Tensor, guidance_scale: float
    ) -> torch.Tensor:
        """The mixture, each row of it as long as that of the text's prediction, as the pipeline has
        it where nobody says otherwise."""
        mixed = super().mix(prediction, empty, guidance_scale)
        lengths = (each.norm(dim=-1, keepdim=True) for each in (prediction, mixed))
        return mixed * (next(lengths) / next(lengths))


class PaddedLumina2(Lumina2Transformer2DModel):
    """Diffusers' transformer with texts of one length, and a mask."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_attention_mask: torch.Tensor,
    ) -> Transformer2DModelOutput:
        """Its prediction, [batch, C, h, w]. hidden_states: the same; timestep: [batch], from noise at 0
        to the picture at 1; encoder_hidden_states: [batch, tokens, features], and their mask."""
        height, width = (size // 2 for size in hidden_states.shape[2:])
        time, text = self.time_caption_embed(hidden_states, timestep, encoder_hidden_states)
        number = torch.arange(text.shape[1], device=text.device)
        mask = encoder_attention_mask.bool() | (
            number == 0
        )  # a text begins with a token of its own
        own = pad(number[:, None], (0, 2)).expand(len(text), -1, 3)
        ids = torch.cat([own, image_ids(height, width, mask.sum(dim=1))], dim=1)
        places = self.rope_embedder._get_freqs_cis(ids)
        text_places, image_places = places.split([len(number), height * width], dim=1)
        for block in self.context_refiner:
            text = run_block(self, block, text, mask, text_places)
        image = self.x_embedder(patchify(hidden_states))
        for block in self.noise_refiner:
            image = run_block(self, block, image, None, image_places, time)
        sequence = torch.cat([text, image], dim=1)
        mask = pad(mask, (0, height * width), value=True)
        for block in self.layers:
            sequence = run_block(self, block, sequence, mask, places, time)
        output = self.norm_out(sequence, time)[:, len(number) :]
        return Transformer2DModelOutput(sample=unpatchify(output, hidden_states.shape))
