"""A tiny pipeline of each family, made of diffusers' own classes with seeded weights and real
tokenizers, and the loss of the training example of each, written out."""

import inspect
import json
import re

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

WORDS = (
    "a the of in on photo drawing red green blue yellow purple orange circle square triangle heart "
    "star dog cat bird fish house tree small large round soft dark bright sky sea"
).split()
RESOLUTION, LIMIT = 16, 12  # pixels, tokens


def clip_tokenizer():
    """A tokenizer of CLIP's kind: letters, and the words that are merged of them."""
    letters = sorted({letter for word in WORDS for letter in word})
    names = [*letters, *(f"{letter}</w>" for letter in letters)]
    merges = []
    for word in WORDS:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            merges.append((parts[0], parts[1]))
            parts = [parts[0] + parts[1], *parts[2:]]
            names.append(parts[0])
    names = [*dict.fromkeys(names), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {name: number for number, name in enumerate(names)}
    return CLIPTokenizer(
        vocab=vocabulary, merges=list(dict.fromkeys(merges)), model_max_length=LIMIT
    )


def t5_tokenizer():
    """A tokenizer of T5's kind: words, and letters for others."""
    letters = sorted({letter for word in WORDS for letter in word})
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -2.0), ("▁", -4.0)]
    pieces += [(f"▁{word}", -3.0) for word in WORDS] + [(letter, -5.0) for letter in letters]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=LIMIT + 4)


def t5(tokenizer, width):
    """A text encoder of T5's kind."""
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=4,
        d_ff=2 * width,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    return T5EncoderModel(config)


def clip(tokenizer, width, projection=None):
    """A text encoder of CLIP's kind, with a projection where its size is given."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LIMIT,
        projection_dim=projection or 8,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModelWithProjection(config) if projection else CLIPTextModel(config)


def vae(channels=4, **more):
    """A VAE that brings 2 x 2 pixels to one latent."""
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        norm_num_groups=4,
        layers_per_block=1,
        sample_size=RESOLUTION,
        **more,
    )


def unet(width, **more):
    """A UNet with two resolutions, that attends to texts of this width."""
    return UNet2DConditionModel(
        sample_size=RESOLUTION // 2,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=width,
        attention_head_dim=2,
        norm_num_groups=4,
        **more,
    )


def betas(**more):
    """The schedule of Stable Diffusion."""
    return DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        steps_offset=1,
        **more,
    )


def stable_diffusion(**more):
    """A pipeline of Stable Diffusion's kind."""
    tokenizer = clip_tokenizer()
    return StableDiffusionPipeline(
        vae(scaling_factor=0.2),
        clip(tokenizer, 16),
        tokenizer,
        unet(16),
        betas(**more),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def stable_diffusion_xl(**more):
    """A pipeline of Stable Diffusion XL's kind."""
    tokenizer = clip_tokenizer()
    return StableDiffusionXLPipeline(
        vae(scaling_factor=0.13),
        clip(tokenizer, 8),
        clip(tokenizer, 16, projection=12),
        tokenizer,
        clip_tokenizer(),
        unet(
            24,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=12 + 6 * 4,
            transformer_layers_per_block=(1, 2),
            use_linear_projection=True,
        ),
        betas(**more),
    )


def pixart(pipeline=PixArtAlphaPipeline, **more):
    """A pipeline of PixArt's kind, which predicts variances too."""
    tokenizer = t5_tokenizer()
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        cross_attention_dim=24,
        sample_size=RESOLUTION // 2,
        caption_channels=20,
        norm_num_groups=4,
        **more,
    )
    encoder = t5(tokenizer, 20)
    return pipeline(tokenizer, encoder, vae(scaling_factor=0.18), transformer, betas())


def stable_diffusion_3(with_t5=True, **more):
    """A pipeline of Stable Diffusion 3's kind."""
    tokenizer, third = clip_tokenizer(), t5_tokenizer() if with_t5 else None
    transformer = SD3Transformer2DModel(
        sample_size=RESOLUTION // 2,
        in_channels=8,
        out_channels=8,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=20,
        pos_embed_max_size=8,
        **more,
    )
    return StableDiffusion3Pipeline(
        transformer,
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae(channels=8, scaling_factor=1.5, shift_factor=0.06),
        clip(tokenizer, 8, projection=8),
        tokenizer,
        clip(tokenizer, 16, projection=12),
        clip_tokenizer(),
        t5(third, 32) if third else None,
        third,
    )


def flux(**more):
    """A pipeline of FLUX.1's kind."""
    tokenizer, second = clip_tokenizer(), t5_tokenizer()
    transformer = FluxTransformer2DModel(
        in_channels=32,
        num_layers=2,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=16,
        axes_dims_rope=(2, 2, 4),
        **more,
    )
    return FluxPipeline(
        FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae(channels=8, scaling_factor=0.36, shift_factor=0.11),
        clip(tokenizer, 16),
        tokenizer,
        t5(second, 24),
        second,
        transformer,
    )


MESSAGE_WORDS = re.findall(  # of the messages in which prompts are put
    r"\w+",
    "system Describe image by detailing color shape size texture quantity text spatial "
    f"relationships objects and background user assistant {SYSTEM_MESSAGE}",
)


def qwen_tokenizer(limit):
    """A tokenizer of Qwen's kind: bytes, and what is merged of them in our words, each with the space
    before it or without."""
    trained = Tokenizer(BPE())
    trained.pre_tokenizer = ByteLevel(add_prefix_space=False)
    words = [f"{space}{word}" for word in [*WORDS, *MESSAGE_WORDS] for space in ("", " ")]
    alphabet = ByteLevel.alphabet()
    trained.train_from_iterator(
        words, BpeTrainer(vocab_size=5000, initial_alphabet=alphabet, show_progress=False)
    )
    special = "<|endoftext|> <|im_start|> <|im_end|> <think> </think> [INST] [/INST]".split()
    special += ["[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"]
    model = json.loads(trained.to_str())["model"]
    for name in special:
        model["vocab"][name] = len(model["vocab"])
    return Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=[tuple(pair) for pair in model["merges"]],
        extra_special_tokens=special[1:],
        model_max_length=limit,
    )


def language_model(tokenizer, width, layers=2):
    """What configurations of language models have in common."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def qwen_image(**more):
    """A pipeline of Qwen-Image's kind."""
    tokenizer = qwen_tokenizer(34 + LIMIT + 4)
    encoder = Qwen2_5_VLConfig(
        text_config={
            **language_model(tokenizer, 16),
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]},
        },
        vision_config={
            "depth": 1,
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_heads": 1,
            "out_hidden_size": 16,
        },
    )
    transformer = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(2, 2, 4),
        **more,
    )
    films = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.1, -0.2, 0.0, 0.3],
        latents_std=[1.0, 2.0, 0.5, 1.5],
    )
    return QwenImagePipeline(
        FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, max_image_seq_len=8192, max_shift=0.9, shift_terminal=0.02
        ),
        films,
        Qwen2_5_VLForConditionalGeneration(encoder),
        tokenizer,
        transformer,
    )


QWEN_CHAT = (  # what Qwen3's template makes of one message without thinking
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
)
MISTRAL_CHAT = (  # what Mistral's template makes of a system's message and one of a user
    "{{ bos_token }}{% for message in messages %}"
    "{% set around = '[SYSTEM_PROMPT]' if message.role == 'system' else '[INST]' %}"
    "{{ around }}{% for part in message.content %}{{ part.text }}{% endfor %}"
    "{{ around | replace('[', '[/') }}{% endfor %}"
)


def flux_2(pipeline, encoder, tokenizer, **more):
    """A pipeline of FLUX.2's kind."""
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=3 * 16,
        timestep_guidance_channels=16,
        axes_dims_rope=(2, 2, 2, 2),
        **more,
    )
    packed = AutoencoderKLFlux2(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
        sample_size=RESOLUTION,
    )
    packed.bn.running_mean += 0.3 * torch.randn(16)
    packed.bn.running_var += torch.rand(16)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    return pipeline(scheduler, packed, encoder, tokenizer, transformer)


def flux_2_klein(is_distilled=False):
    """A pipeline of FLUX.2-klein's kind: of its text encoder the states of 27 layers are read."""
    tokenizer = qwen_tokenizer(LIMIT + 10)
    tokenizer.chat_template = QWEN_CHAT
    encoder = Qwen3ForCausalLM(Qwen3Config(**language_model(tokenizer, 16, layers=27)))
    pipeline = flux_2(Flux2KleinPipeline, encoder, tokenizer, guidance_embeds=False)
    pipeline.register_to_config(is_distilled=is_distilled)
    return pipeline


def flux_2_dev():
    """A pipeline of FLUX.2-dev's kind, with a tokenizer instead of what reads pictures too, which takes
    torchvision."""
    tokenizer = qwen_tokenizer(LIMIT + 40)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.chat_template = MISTRAL_CHAT
    text = {**language_model(tokenizer, 16, layers=30), "model_type": "mistral"}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1_000_000_000}  # as published
    vision = {
        "model_type": "pixtral",
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "image_size": 16,
    }
    config = Mistral3Config(text_config=text, vision_config=vision)
    encoder = Mistral3ForConditionalGeneration(config)
    return flux_2(Flux2Pipeline, encoder, tokenizer)


CHAT = (  # what Qwen3's template does with one message of a user
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>{% endif %}"
)
CHAT_LIMIT = 48  # tokens: some captions take more than 32, to which Z-Image fills up, some less


def chat_tokenizer():
    """A tokenizer of Qwen's kind, a token a letter."""
    letters = sorted({letter for word in WORDS for letter in word} | {"Ġ", "Ċ"})
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {name: number for number, name in enumerate([*letters, *special])}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[], model_max_length=CHAT_LIMIT)
    tokenizer.add_special_tokens({"additional_special_tokens": special[1:]})
    tokenizer.chat_template = CHAT
    return tokenizer


def z_image(**more):
    """A pipeline of Z-Image's kind."""
    tokenizer = chat_tokenizer()
    transformer = ZImageTransformer2DModel(
        in_channels=8,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=20,
        axes_dims=[8, 4, 4],
        axes_lens=[128, 16, 16],
        **more,
    )
    return ZImagePipeline(
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae(channels=8, scaling_factor=0.36, shift_factor=0.11),
        Qwen3Model(Qwen3Config(**language_model(tokenizer, 20))),
        tokenizer,
        transformer,
    )


SANA_INSTRUCTION = (
    inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
)


def gemma_tokenizer(limit, *instructions):
    """A tokenizer of Gemma's kind: letters, and the words of ours and of instructions."""
    words = {f"▁{word}" for word in [*WORDS, *" ".join(instructions).split()]}
    names, merges = sorted({letter for word in words for letter in word} | {"\n"}), {}
    for word in sorted(words):
        for end in range(2, len(word) + 1):
            names.append(word[:end])
            merges[word[: end - 1], word[end - 1]] = None
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    vocabulary = {name: number for number, name in enumerate(dict.fromkeys([*special, *names]))}
    how = {"model_max_length": limit, "add_bos_token": True}
    return GemmaTokenizer(vocab=vocabulary, merges=list(merges), **how)


def gemma(tokenizer, width):
    """A text encoder of Gemma's kind."""
    return Gemma2Model(Gemma2Config(**language_model(tokenizer, width), sliding_window=512))


def sana(scheduler=None, **more):
    """A pipeline of Sana's kind."""
    tokenizer = gemma_tokenizer(LIMIT + 4, *SANA_INSTRUCTION)
    transformer = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=20,
        sample_size=RESOLUTION // 2,
        **more,
    )
    vae = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=4,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        downsample_block_type="Conv",
        upsample_block_type="interpolate",
        scaling_factor=0.41,
    )
    flows = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    scheduler = scheduler or DPMSolverMultistepScheduler(**flows)
    return SanaPipeline(tokenizer, gemma(tokenizer, 20), vae, transformer, scheduler)


LUMINA_LIMIT = 60  # tokens, of which the system prompt takes most


def lumina2(**more):
    """A pipeline of Lumina2's kind."""
    tokenizer = gemma_tokenizer(LUMINA_LIMIT, LUMINA_SYSTEM)
    transformer = Lumina2Transformer2DModel(
        sample_size=RESOLUTION // 2,
        in_channels=8,
        hidden_size=32,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=4,
        axes_dim_rope=(8, 4, 4),
        axes_lens=(80, 16, 16),
        cap_feat_dim=20,
        **more,
    )
    return Lumina2Pipeline(
        transformer,
        FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae(channels=8, scaling_factor=0.36, shift_factor=0.11),
        gemma(tokenizer, 20),
        tokenizer,
    )


LUMINA_SYSTEM = (
    "You are an assistant designed to generate superior images with the superior degree of "
    "image-text alignment based on textual prompts or user prompts. <Prompt Start>"
)
PIPELINES = {  # those with a - in their name are variants, of which only loss and pictures are tested
    "sd": stable_diffusion,
    "sd-v": lambda: stable_diffusion(prediction_type="v_prediction", rescale_betas_zero_snr=True),
    "sdxl": stable_diffusion_xl,
    "sdxl-v": lambda: stable_diffusion_xl(prediction_type="v_prediction"),
    "pixart": pixart,
    "pixart-sized": lambda: pixart(use_additional_conditions=True),
    "pixart-sigma": lambda: pixart(PixArtSigmaPipeline),
    "sd3": stable_diffusion_3,
    "sd3-medium35": lambda: stable_diffusion_3(dual_attention_layers=(0,), qk_norm="rms_norm"),
    "sd3-without-t5": lambda: stable_diffusion_3(with_t5=False),
    "flux": lambda: flux(guidance_embeds=True),
    "flux-schnell": flux,
    "qwen": qwen_image,
    "klein": flux_2_klein,
    "klein-distilled": lambda: flux_2_klein(is_distilled=True),
    "flux2": flux_2_dev,
    "zimage": z_image,
    "sana": sana,
    "sana-euler": lambda: sana(
        FlowMatchEulerDiscreteScheduler(shift=3.0), qk_norm="rms_norm_across_heads"
    ),
    "lumina2": lumina2,
}


def make_pipeline(family):
    """The tiny pipeline of a family, with weights large enough for the text to matter."""
    torch.manual_seed(0)
    pipeline = PIPELINES[family]()
    denoiser = getattr(pipeline, "unet", None) or pipeline.transformer
    for name, parameter in denoiser.named_parameters():
        if parameter.ndim > 1:
            parameter.data += 0.1 * torch.randn(parameter.shape)
    return pipeline


def tokens_of(tokenizer, prompts, limit=LIMIT):
    """Tokens of prompts and their mask."""
    return tokenizer(
        prompts, padding="max_length", truncation=True, max_length=limit, return_tensors="pt"
    )


def sd_loss(pipeline, prompts, sizes, latents, noise, timesteps):
    """examples/text_to_image/train_text_to_image.py: mean squared error of each sample."""
    states = pipeline.text_encoder(tokens_of(pipeline.tokenizer, prompts).input_ids)[0]
    noisy = pipeline.scheduler.add_noise(latents, noise, timesteps)
    prediction = pipeline.unet(noisy, timesteps, states, return_dict=False)[0]
    return mean_square(prediction - beta_target(pipeline, latents, noise, timesteps))


def beta_target(pipeline, latents, noise, timesteps):
    """What is predicted where betas add the noise."""
    is_v = pipeline.scheduler.config.prediction_type == "v_prediction"
    return pipeline.scheduler.get_velocity(latents, noise, timesteps) if is_v else noise


def mean_square(errors):
    """Of each sample."""
    return errors.square().mean(dim=(1, 2, 3))


def clip_states(pipeline, prompts):
    """Last but one hidden states and pooled text of both CLIP encoders."""
    outputs = []
    for tokenizer, encoder in (
        (pipeline.tokenizer, pipeline.text_encoder),
        (pipeline.tokenizer_2, pipeline.text_encoder_2),
    ):
        tokens = tokens_of(tokenizer, prompts).input_ids
        outputs.append(encoder(tokens, output_hidden_states=True))
    return [output.hidden_states[-2] for output in outputs], [output[0] for output in outputs]


def sdxl_loss(pipeline, prompts, sizes, latents, noise, timesteps):
    """examples/text_to_image/train_text_to_image_sdxl.py, with --center_crop."""
    states, pooled = clip_states(pipeline, prompts)
    ids = []
    for width, height in sizes:
        scale = RESOLUTION / min(width, height)
        top, left = (int(round((int(scale * side) - RESOLUTION) / 2)) for side in (height, width))
        ids.append([height, width, top, left, RESOLUTION, RESOLUTION])
    noisy = pipeline.scheduler.add_noise(latents, noise, timesteps)
    prediction = pipeline.unet(
        noisy,
        timesteps,
        torch.cat(states, dim=-1),
        added_cond_kwargs={"text_embeds": pooled[1], "time_ids": torch.tensor(ids).float()},
    ).sample
    return mean_square(prediction - beta_target(pipeline, latents, noise, timesteps))


def pixart_loss(pipeline, prompts, sizes, latents, noise, timesteps):
    """examples/research_projects/pixart/train_pixart_controlnet_hf.py, without its ControlNet."""
    tokens = tokens_of(pipeline.tokenizer, prompts, LIMIT + 4)
    mask = tokens.attention_mask
    states = pipeline.text_encoder(tokens.input_ids, attention_mask=mask)[0]
    sized = {"resolution": None, "aspect_ratio": None}
    if pipeline.transformer.config.use_additional_conditions:
        sized["resolution"] = torch.tensor([[RESOLUTION, RESOLUTION]] * len(prompts)).float()
        sized["aspect_ratio"] = torch.ones(len(prompts), 1)
    prediction = pipeline.transformer(
        pipeline.scheduler.add_noise(latents, noise, timesteps),
        encoder_hidden_states=states,
        encoder_attention_mask=mask,
        timestep=timesteps,
        added_cond_kwargs=sized,
    ).sample.chunk(2, dim=1)[0]
    return mean_square(prediction - noise)


def sigmas_of(pipeline, timesteps):
    """Timesteps and sigmas [n, 1, 1, 1] of indices into the scheduler's own table."""
    scheduler = pipeline.scheduler.from_config(pipeline.scheduler.config)
    return scheduler.timesteps[timesteps], scheduler.sigmas[timesteps][:, None, None, None]


def sd3_loss(pipeline, prompts, sizes, latents, noise, indices):
    """examples/dreambooth/train_dreambooth_lora_sd3.py, with --precondition_outputs 1, its default.
    indices: into the scheduler's table, which it draws."""
    timesteps, sigmas = sigmas_of(pipeline, indices)
    states, pooled = clip_states(pipeline, prompts)
    clip = torch.cat(states, dim=-1)
    if pipeline.text_encoder_3:
        tokens = tokens_of(pipeline.tokenizer_3, prompts, LIMIT + 4).input_ids
        t5 = pipeline.text_encoder_3(tokens)[0]
    else:
        t5 = torch.zeros(len(prompts), 77, 32)
    clip = torch.nn.functional.pad(clip, (0, t5.shape[-1] - clip.shape[-1]))
    noisy = (1.0 - sigmas) * latents + sigmas * noise
    prediction = pipeline.transformer(
        hidden_states=noisy,
        timestep=timesteps,
        encoder_hidden_states=torch.cat([clip, t5], dim=-2),
        pooled_projections=torch.cat(pooled, dim=-1),
        return_dict=False,
    )[0]
    return mean_square(prediction * (-sigmas) + noisy - latents)


def flux_loss(pipeline, prompts, sizes, latents, noise, indices):
    """examples/dreambooth/train_dreambooth_lora_flux.py; indices as of `sd3_loss`."""
    timesteps, sigmas = sigmas_of(pipeline, indices)
    tokens = tokens_of(pipeline.tokenizer_2, prompts, LIMIT + 4).input_ids
    states = pipeline.text_encoder_2(tokens, output_hidden_states=False)[0]
    short = tokens_of(pipeline.tokenizer, prompts).input_ids
    noisy = (1.0 - sigmas) * latents + sigmas * noise
    number, channels, height, width = latents.shape
    prediction = pipeline.transformer(
        hidden_states=FluxPipeline._pack_latents(noisy, number, channels, height, width),
        timestep=timesteps / 1000,
        guidance=torch.full((number,), 3.5)
        if pipeline.transformer.config.guidance_embeds
        else None,
        pooled_projections=pipeline.text_encoder(short).pooler_output,
        encoder_hidden_states=states,
        txt_ids=torch.zeros(states.shape[1], 3),
        img_ids=FluxPipeline._prepare_latent_image_ids(
            number, height // 2, width // 2, "cpu", torch.float32
        ),
        return_dict=False,
    )[0]
    factor = pipeline.vae_scale_factor
    prediction = FluxPipeline._unpack_latents(prediction, height * factor, width * factor, factor)
    return mean_square(prediction - (noise - latents))


def qwen_loss(pipeline, prompts, sizes, latents, noise, indices):
    """examples/dreambooth/train_dreambooth_lora_qwen_image.py; indices as of `sd3_loss`. Its
    latents have one frame, and its texts are of the longest one's length."""
    timesteps, sigmas = sigmas_of(pipeline, indices)
    states, mask = pipeline.encode_prompt(list(prompts), max_sequence_length=512)
    noisy = ((1.0 - sigmas) * latents + sigmas * noise)[:, :, None]
    number, channels, _, height, width = noisy.shape
    prediction = pipeline.transformer(
        hidden_states=QwenImagePipeline._pack_latents(
            noisy.permute(0, 2, 1, 3, 4), number, channels, height, width
        ),
        encoder_hidden_states=states,
        encoder_hidden_states_mask=mask,
        timestep=timesteps / 1000,
        img_shapes=[(1, height // 2, width // 2)] * number,
        return_dict=False,
    )[0]
    factor = pipeline.vae_scale_factor
    prediction = QwenImagePipeline._unpack_latents(
        prediction, height * factor, width * factor, factor
    )
    return mean_square(prediction[:, :, 0] - (noise - latents))


def flux_2_loss(pipeline, prompts, sizes, latents, noise, indices):
    """examples/dreambooth/train_dreambooth_lora_flux2.py and ..._flux2_klein.py; indices as of
    `sd3_loss`. Their latents are packed 2 x 2 from the beginning."""
    timesteps, sigmas = sigmas_of(pipeline, indices)
    tokens = pipeline.tokenizer.model_max_length
    states, text_ids = pipeline.encode_prompt(list(prompts), max_sequence_length=tokens)
    latents, noise = pipeline._patchify_latents(latents), pipeline._patchify_latents(noise)
    noisy = (1.0 - sigmas) * latents + sigmas * noise
    ids = pipeline._prepare_latent_ids(latents)
    is_told = pipeline.transformer.config.guidance_embeds
    prediction = pipeline.transformer(
        hidden_states=pipeline._pack_latents(noisy),
        timestep=timesteps / 1000,
        guidance=torch.full([1], 3.5).expand(len(latents)) if is_told else None,
        encoder_hidden_states=states,
        txt_ids=text_ids,
        img_ids=ids,
        return_dict=False,
    )[0]
    prediction = pipeline._unpack_latents_with_ids(prediction, ids)
    return mean_square(prediction - (noise - latents))


def z_image_loss(pipeline, prompts, sizes, latents, noise, indices):
    """examples/dreambooth/train_dreambooth_lora_z_image.py; indices as of `sd3_loss`."""
    timesteps, sigmas = sigmas_of(pipeline, indices)
    texts, _ = pipeline.encode_prompt(list(prompts), "cpu", False, max_sequence_length=CHAT_LIMIT)
    noisy = (1.0 - sigmas) * latents + sigmas * noise
    predictions = pipeline.transformer(
        list(noisy.unsqueeze(2).unbind(dim=0)),
        (1000 - timesteps) / 1000,
        texts,
        return_dict=False,
    )[0]
    prediction = -torch.stack(predictions, dim=0).squeeze(2)
    return mean_square(prediction - (noise - latents))


def sana_loss(pipeline, prompts, sizes, latents, noise, indices):
    """examples/dreambooth/train_dreambooth_lora_sana.py, with the pipeline's instruction; indices as
    of `sd3_loss`. Whatever the scheduler, its table is that of Euler's, of the same configuration."""
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    timesteps, sigmas = scheduler.timesteps[indices], scheduler.sigmas[indices]
    sigmas = sigmas[:, None, None, None]
    states, mask, _, _ = pipeline.encode_prompt(
        list(prompts),
        do_classifier_free_guidance=False,
        max_sequence_length=LIMIT + 4,
        complex_human_instruction=SANA_INSTRUCTION,
    )
    prediction = pipeline.transformer(
        hidden_states=(1.0 - sigmas) * latents + sigmas * noise,
        encoder_hidden_states=states,
        encoder_attention_mask=mask,
        timestep=timesteps,
        return_dict=False,
    )[0]
    return mean_square(prediction - (noise - latents))


def lumina2_loss(pipeline, prompts, sizes, latents, noise, indices):
    """examples/dreambooth/train_dreambooth_lora_lumina2.py; indices as of `sd3_loss`. A sigma of 1
    is the picture."""
    timesteps, sigmas = sigmas_of(pipeline, indices)
    states, mask, _, _ = pipeline.encode_prompt(
        list(prompts), do_classifier_free_guidance=False, max_sequence_length=LUMINA_LIMIT
    )
    prediction = pipeline.transformer(
        hidden_states=(1.0 - sigmas) * noise + sigmas * latents,
        encoder_hidden_states=states,
        encoder_attention_mask=mask,
        timestep=timesteps / 1000,
        return_dict=False,
    )[0]
    return mean_square(prediction - (latents - noise))


LOSSES = {
    "sd": sd_loss,
    "sdxl": sdxl_loss,
    "pixart": pixart_loss,
    "sd3": sd3_loss,
    "flux": flux_loss,
    "qwen": qwen_loss,
    "klein": flux_2_loss,
    "flux2": flux_2_loss,
    "zimage": z_image_loss,
    "sana": sana_loss,
    "lumina2": lumina2_loss,
}


def training_loss(family, *samples):
    """The loss of each sample by the training example of a family: (pipeline, prompts, sizes of the
    pictures, latents, noise, timesteps or indices of the scheduler's table)."""
    return LOSSES[family.partition("-")[0]](*samples)


def normalised(family, pipeline, mean):
    """The posterior's mean as a family's training example normalises latents."""
    config = pipeline.vae.config
    if family.partition("-")[0] in ("klein", "flux2"):
        own, packed = pipeline.vae.bn, pipeline._patchify_latents(mean)
        deviation = torch.sqrt(own.running_var + config.batch_norm_eps)
        packed = (packed - own.running_mean[:, None, None]) / deviation[:, None, None]
        return pipeline._unpatchify_latents(packed)
    if family == "qwen":
        means, deviations = torch.tensor(config.latents_mean), torch.tensor(config.latents_std)
        return (mean - means[:, None, None]) * (1.0 / deviations)[:, None, None]
    if family.partition("-")[0] in ("sd3", "flux", "zimage", "lumina2"):
        return (mean - config.shift_factor) * config.scaling_factor
    return mean * config.scaling_factor


SIZES = [(16, 16), (24, 16), (20, 40), (32, 32)]  # of the training images, (width, height)
CAPTIONS = ["a red circle", "the blue square on a tree", "large dog", "a soft yellow star"]


def make_root(folder, pipeline, **settings):
    """A data root of four images, whose model is in a folder."""
    images = folder / "laion_subset/images"
    images.mkdir(parents=True)
    generator = torch.Generator().manual_seed(1)
    for number, (width, height) in enumerate(SIZES):
        pixels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(images / f"{number:04d}.png")
    (folder / "laion_subset/captions.txt").write_text("\n".join(CAPTIONS) + "\n")
    own = {"name": "tiny", "pipeline": str(pipeline), "resolution": RESOLUTION, **settings}
    (folder / "dataset.json").write_text(json.dumps(own))
    pixels = torch.randint(0, 256, (16, 16, 3), generator=generator, dtype=torch.uint8)
    (folder / "synth").mkdir()
    Image.fromarray(pixels.numpy()).save(folder / "synth/query.png")
    task = {"synth_image_path": "synth/query.png", "prompt": "a red square"}
    (folder / "tasks.json").write_text(json.dumps([task]))
    return folder
