"""The published models that most people start from, by the configurations of their parts: what is
not the default of diffusers' and transformers' classes. No weights are needed to count what they cost.

Source: config.json of each part as published under the hub's names below.
"""

from dataclasses import dataclass
from typing import Any

STABLE_UNET = {  # Stable Diffusion 1 and 2
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "layers_per_block": 2,
}
XL_UNET = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "use_linear_projection": True,
}
THREE = {  # Stable Diffusion 3 and 3.5
    "sample_size": 128,
    "in_channels": 16,
    "out_channels": 16,
    "attention_head_dim": 64,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 2048,
}
FLUX = {"num_layers": 19, "num_single_layers": 38, "num_attention_heads": 24}
PIXART = {
    "num_layers": 28,
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "cross_attention_dim": 1152,
    "caption_channels": 4096,
    "sample_size": 128,
}
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
VAE_16 = {**VAE, "latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}
CLIP_L = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
}
CLIP_H = {  # OpenCLIP's, without its last layer
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "projection_dim": 512,
}
CLIP_G = {  # OpenCLIP's
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
}
T5_XXL = {
    "d_model": 4096,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}
QWEN_VL = {  # Qwen2.5-VL-7B
    "text_config": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
    },
    "vision_config": {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420},
}
# Of FLUX.2: dev's transformer is the class's default; klein's by its size, and Qwen3 as published.
# Source: parameters of the authors' code (Klein4BParams, Klein9BParams), config.json of Qwen3.
KLEIN = {"guidance_embeds": False}
KLEIN_4B = {**KLEIN, "num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24}
KLEIN_9B = {**KLEIN, "num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32}
QWEN_3 = {"num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8}
QWEN_3_4B = {**QWEN_3, "hidden_size": 2560, "intermediate_size": 9728, "tie_word_embeddings": True}
QWEN_3_8B = {**QWEN_3, "hidden_size": 4096, "intermediate_size": 12288}
MISTRAL_3 = {  # Mistral Small 3.2
    "text_config": {
        "model_type": "mistral",
        "hidden_size": 5120,
        "intermediate_size": 32768,
        "num_hidden_layers": 40,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 131072,
        "max_position_embeddings": 131072,
    },
    "vision_config": {
        "model_type": "pixtral",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
    },
    "tie_word_embeddings": False,
}
QWEN3_4B = {
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
}
GEMMA_2 = {  # of 2B; the rest are the defaults of its class
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "vocab_size": 256000,
}
VITS = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
DC_AE = {  # Sana's VAE; the rest are the defaults of its class
    "encoder_block_types": VITS,
    "decoder_block_types": VITS,
    "downsample_block_type": "Conv",
    "upsample_block_type": "interpolate",
}
SANA_SMALL = {
    "num_layers": 28,
    "num_attention_heads": 36,
    "num_cross_attention_heads": 16,
    "cross_attention_head_dim": 72,
    "cross_attention_dim": 1152,
}
POOLED = "CLIPTextModelWithProjection"


@dataclass(frozen=True)
class Published:
    """A pipeline by its parts, {name: (class, configuration)}."""

    hub: str
    pipeline: str
    parts: dict[str, tuple[str, dict[str, Any]]]
    limits: dict[str, int]  # tokens that each tokenizer reads of a prompt
    resolution: int  # pixels of a side


def stable(hub: str, unet: dict, text: dict, resolution: int) -> Published:
    """One of Stable Diffusion 1 and 2."""
    parts = {
        "unet": ("UNet2DConditionModel", {**STABLE_UNET, **unet}),
        "vae": ("AutoencoderKL", VAE),
        "text_encoder": ("CLIPTextModel", text),
    }
    return Published(hub, "StableDiffusionPipeline", parts, {"tokenizer": 77}, resolution)


def three(hub: str, transformer: dict) -> Published:
    """One of Stable Diffusion 3 and 3.5."""
    parts = {
        "transformer": ("SD3Transformer2DModel", {**THREE, **transformer}),
        "vae": ("AutoencoderKL", VAE_16),
        "text_encoder": (POOLED, CLIP_L),
        "text_encoder_2": (POOLED, CLIP_G),
        "text_encoder_3": ("T5EncoderModel", T5_XXL),
    }
    limits = {"tokenizer": 77, "tokenizer_2": 77, "tokenizer_3": 512}
    return Published(hub, "StableDiffusion3Pipeline", parts, limits, 1024)


def flux(hub: str, guidance: bool) -> Published:
    """One of FLUX.1."""
    parts = {
        "transformer": ("FluxTransformer2DModel", {**FLUX, "guidance_embeds": guidance}),
        "vae": ("AutoencoderKL", VAE_16),
        "text_encoder": ("CLIPTextModel", CLIP_L),
        "text_encoder_2": ("T5EncoderModel", T5_XXL),
    }
    return Published(hub, "FluxPipeline", parts, {"tokenizer": 77, "tokenizer_2": 512}, 1024)


def pixart(hub: str, pipeline: str, is_told_sizes: bool) -> Published:
    """One of PixArt."""
    transformer = {**PIXART, "use_additional_conditions": is_told_sizes}
    parts = {
        "transformer": ("PixArtTransformer2DModel", transformer),
        "vae": ("AutoencoderKL", VAE),
        "text_encoder": ("T5EncoderModel", T5_XXL),
    }
    return Published(hub, pipeline, parts, {"tokenizer": 512}, 1024)


QWEN = Published(  # Qwen-Image and Qwen-Image-2512; its transformer's and VAE's are the defaults
    "Qwen/Qwen-Image",
    "QwenImagePipeline",
    {
        "transformer": ("QwenImageTransformer2DModel", {}),
        "vae": ("AutoencoderKLQwenImage", {}),
        "text_encoder": ("Qwen2_5_VLForConditionalGeneration", QWEN_VL),
    },
    {"tokenizer": 131072},
    1024,
)


def flux_2(hub: str, pipeline: str, transformer: dict, encoder: tuple[str, dict]) -> Published:
    """One of FLUX.2."""
    parts = {
        "transformer": ("Flux2Transformer2DModel", transformer),
        "vae": ("AutoencoderKLFlux2", {}),
        "text_encoder": encoder,
    }
    return Published(f"black-forest-labs/{hub}", pipeline, parts, {"tokenizer": 131072}, 1024)


def klein(hub: str, transformer: dict, text: dict) -> Published:
    """One of FLUX.2-klein: three layers' states of the text."""
    transformer = {**transformer, "joint_attention_dim": 3 * text["hidden_size"]}
    return flux_2(hub, "Flux2KleinPipeline", transformer, ("Qwen3ForCausalLM", text))


def z_image(hub: str) -> Published:
    """Z-Image, whose base and turbo are made alike: but for these, the defaults of its class."""
    parts = {
        "transformer": ("ZImageTransformer2DModel", {"axes_lens": (1536, 512, 512)}),
        "vae": ("AutoencoderKL", VAE_16),
        "text_encoder": ("Qwen3Model", QWEN3_4B),
    }
    return Published(hub, "ZImagePipeline", parts, {"tokenizer": 512}, 1024)


def sana(hub: str, transformer: dict) -> Published:
    """One of Sana; of 1.6B parameters where the transformer is as its class has it."""
    parts = {
        "transformer": ("SanaTransformer2DModel", transformer),
        "vae": ("AutoencoderDC", DC_AE),
        "text_encoder": ("Gemma2Model", GEMMA_2),
    }
    return Published(hub, "SanaPipeline", parts, {"tokenizer": 300}, 1024)


XL = Published(
    "stabilityai/stable-diffusion-xl-base-1.0",
    "StableDiffusionXLPipeline",
    {
        "unet": ("UNet2DConditionModel", XL_UNET),
        "vae": ("AutoencoderKL", VAE),
        "text_encoder": ("CLIPTextModel", CLIP_L),
        "text_encoder_2": (POOLED, CLIP_G),
    },
    {"tokenizer": 77, "tokenizer_2": 77},
    1024,
)
LUMINA = Published(
    "Alpha-VLLM/Lumina-Image-2.0",
    "Lumina2Pipeline",
    {
        "transformer": ("Lumina2Transformer2DModel", {"cap_feat_dim": 2304}),
        "vae": ("AutoencoderKL", VAE_16),
        "text_encoder": ("Gemma2Model", GEMMA_2),
    },
    {"tokenizer": 256},
    1024,
)
MEDIUM = {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536}
MEDIUM_35 = {
    **MEDIUM,
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
    "qk_norm": "rms_norm",
}
LARGE_35 = {
    "num_layers": 38,
    "num_attention_heads": 38,
    "caption_projection_dim": 2432,
    "pos_embed_max_size": 192,
    "qk_norm": "rms_norm",
}
TWO = {
    "sample_size": 96,
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
}
PUBLISHED = {
    "Stable Diffusion 1.5": stable(
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
        CLIP_L,
        512,
    ),
    "Stable Diffusion 2.1": stable("stabilityai/stable-diffusion-2-1", TWO, CLIP_H, 768),
    "Stable Diffusion XL": XL,
    "Stable Diffusion 3 medium": three(
        "stabilityai/stable-diffusion-3-medium-diffusers", {**MEDIUM, "pos_embed_max_size": 192}
    ),
    "Stable Diffusion 3.5 medium": three("stabilityai/stable-diffusion-3.5-medium", MEDIUM_35),
    "Stable Diffusion 3.5 large": three("stabilityai/stable-diffusion-3.5-large", LARGE_35),
    "FLUX.1-dev": flux("black-forest-labs/FLUX.1-dev", True),
    "FLUX.1-schnell": flux("black-forest-labs/FLUX.1-schnell", False),
    "PixArt-alpha": pixart("PixArt-alpha/PixArt-XL-2-1024-MS", "PixArtAlphaPipeline", True),
    "PixArt-sigma": pixart("PixArt-alpha/PixArt-Sigma-XL-2-1024-MS", "PixArtSigmaPipeline", False),
    "Qwen-Image": QWEN,
    "FLUX.2-klein-4B": klein("FLUX.2-klein-4B", KLEIN_4B, QWEN_3_4B),
    "FLUX.2-klein-9B": klein("FLUX.2-klein-9B", KLEIN_9B, QWEN_3_8B),
    "FLUX.2-dev": flux_2(
        "FLUX.2-dev", "Flux2Pipeline", {}, ("Mistral3ForConditionalGeneration", MISTRAL_3)
    ),
    "Z-Image": z_image("Tongyi-MAI/Z-Image"),
    "Z-Image-Turbo": z_image("Tongyi-MAI/Z-Image-Turbo"),
    "Sana 1.6B": sana("Efficient-Large-Model/Sana_1600M_1024px_diffusers", {}),
    "Sana 0.6B": sana("Efficient-Large-Model/Sana_600M_1024px_diffusers", SANA_SMALL),
    "Lumina-Image 2.0": LUMINA,
}
