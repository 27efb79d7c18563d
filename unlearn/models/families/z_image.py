"""Z-Image, base and turbo: Qwen3 for the text, in its chat template, and a transformer over one
sequence of image and text."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import ZImageTransformer2DModel
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch.nn.functional import pad

from ...errors import UserError
from .checks import check_colours, check_scaling, check_transformer
from .interface import Parts, Refuse
from .single_streams import SingleStream, image_ids, patchify, run_block, unpatchify
from .texts import check_tokens

# Qwen3's template of a user's message, thinking allowed. Written out, because a template that came
# with a model is a program.
TEMPLATE = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
MULTIPLE = 32  # positions, to which texts and images are filled up, each with a learned token
SIZED = "2-1"  # the layers of patches of 2 x 2 latents of one frame


class ZImage(SingleStream):
    name = "Z-Image"
    classes = {
        "transformer": ("ZImageTransformer2DModel",),
        "vae": ("AutoencoderKL",),
        "text_encoder": ("Qwen3Model", "Qwen3ForCausalLM"),
    }
    encoders_in_files = {"text_encoder": "qwen3_4b"}
    longest = 512
    renamed = {
        "attention.to_out.0": "attention.out",
        "attention.norm_q": "attention.q_norm",
        "attention.norm_k": "attention.k_norm",
        f"all_x_embedder.{SIZED}": "x_embedder",
        f"all_final_layer.{SIZED}": "final_layer",
    }

    def owns(self, pipeline: str, classes: Mapping[str, str]) -> bool:
        return pipeline == "ZImagePipeline"

    def prepare(self, denoiser: Any) -> None:
        super().prepare(denoiser)
        denoiser.__class__ = PaddedZImage

    def check_fit(self, parts: Parts, which: str, refuse: Refuse) -> None:
        check_colours(parts, refuse)
        check_tokens(parts, "text_encoder", "tokenizer", refuse, self.longest)
        width = parts.texts["text_encoder"]["hidden_size"]
        expected = {
            "in_channels": (parts.vae.get("latent_channels"), "its VAE's latents have"),
            "cap_feat_dim": (width, "its text encoder gives"),
        }
        check_transformer(parts, which, expected, refuse)
        sizes = parts.denoiser.get("all_patch_size"), parts.denoiser.get("all_f_patch_size")
        if [list(size or ()) for size in sizes] != [[self.patch], [1]]:
            refuse(f"{which} takes patches of {sizes!s:.40}; expected of 2 x 2 latents, (2,), (1,)")
        if parts.denoiser.get("siglip_feat_dim") is not None:
            refuse(
                f"{which} reads pictures too (siglip_feat_dim), as that of Z-Image-Omni; supported "
                f"is Z-Image, which makes pictures from text alone"
            )
        self.check_schedule(parts, refuse)
        check_scaling(parts, refuse)

    def most_latents(self, denoiser: Mapping[str, Any]) -> int:
        return self.patch * min(denoiser["axes_lens"][1:])

    def own_latent_side(self, denoiser: Mapping[str, Any]) -> int:
        return 128  # its configuration does not say; diffusers' pipeline takes this

    def wrap(self, prompts: Sequence[str]) -> list[str]:
        return [TEMPLATE.format(prompt) for prompt in prompts]

    def encode_texts(self, pipeline: Any, texts: Sequence[str]) -> dict[str, torch.Tensor]:
        tokenizer = pipeline.tokenizer
        if "<|im_start|>" not in tokenizer.get_vocab():
            raise UserError(
                "its tokenizer has no token <|im_start|>, as that of Qwen3 has, whose chats "
                f"{self.name} reads"
            )
        return super().encode_texts(pipeline, texts)


class PaddedZImage(ZImageTransformer2DModel):
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
        time = self.t_embedder(timestep * self.t_scale).type_as(hidden_states)
        text, mask, lengths = self.refine_text(encoder_hidden_states, encoder_attention_mask)
        image, places = self.refine_image(hidden_states, lengths, time)
        sequence = torch.cat([image, text], dim=1)
        mask = pad(mask, (image.shape[1], 0), value=True)
        places = torch.cat([places, self.text_places(text)], dim=1)
        for block in self.layers:
            sequence = run_block(self, block, sequence, mask, places, time)
        output = self.all_final_layer[SIZED](sequence, c=time)[:, : height * width]
        return Transformer2DModelOutput(sample=unpatchify(output, hidden_states.shape))

    def refine_text(
        self, states: torch.Tensor, mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The text's part of the sequence, which of its positions are read, and how many."""
        missing = -states.shape[1] % MULTIPLE
        states, mask = pad(states, (0, 0, 0, missing)), pad(mask, (0, missing)).bool()
        filled = (mask.sum(dim=1) + MULTIPLE - 1) // MULTIPLE * MULTIPLE
        lengths = filled.clamp(min=MULTIPLE)
        is_read = torch.arange(mask.shape[1], device=mask.device) < lengths[:, None]
        text = torch.where(mask[..., None], self.cap_embedder(states), self.cap_pad_token)
        places = self.text_places(text)
        for block in self.context_refiner:
            text = run_block(self, block, text, is_read, places)
        return text, is_read, lengths

    def text_places(self, text: torch.Tensor) -> torch.Tensor:
        """The rotations of a text's positions, which count from 1."""
        number = torch.arange(1, text.shape[1] + 1, device=text.device)
        places = self.rope_embedder(pad(number[:, None], (0, 2)))
        return places.expand(len(text), *places.shape)

    def refine_image(
        self, latents: torch.Tensor, lengths: torch.Tensor, time: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The image's part of the sequence, and the rotations of its positions."""
        image = self.all_x_embedder[SIZED](patchify(latents))
        height, width = (size // 2 for size in latents.shape[2:])
        missing = -image.shape[1] % MULTIPLE
        filling = self.x_pad_token.to(image).expand(len(image), missing, image.shape[-1])
        ids = pad(image_ids(height, width, lengths + 1), (0, 0, 0, missing))
        places = self.rope_embedder(ids.flatten(0, 1)).unflatten(0, ids.shape[:2])
        image = torch.cat([image, filling], dim=1)
        for block in self.noise_refiner:
            image = run_block(self, block, image, None, places, time)
        return image, places
