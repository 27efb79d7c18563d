"""Weights of transformers and what stands beside them under the names of their authors' programs, as
published files have them: patterns of diffusers' names and what they become."""

import re

import torch
from safetensors.torch import load_file
from test_attribute import rename

TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
# diffusers' names -> those of the authors' programs (black-forest-labs/flux and flux2,
# Stability-AI/sd3.5, Tongyi-MAI/Z-Image, Alpha-VLLM/Lumina-Image-2.0, NVlabs/Sana, PixArt-alpha), as their
# published files have them, without layers that are joined there
FLUX_NAMES = [
    (r"^time_text_embed\.timestep_embedder\.linear_1", "time_in.in_layer"),
    (r"^time_text_embed\.timestep_embedder\.linear_2", "time_in.out_layer"),
    (r"^time_text_embed\.text_embedder\.linear_1", "vector_in.in_layer"),
    (r"^time_text_embed\.text_embedder\.linear_2", "vector_in.out_layer"),
    (r"^time_text_embed\.guidance_embedder\.linear_1", "guidance_in.in_layer"),
    (r"^time_text_embed\.guidance_embedder\.linear_2", "guidance_in.out_layer"),
    (r"^context_embedder", "txt_in"),
    (r"^x_embedder", "img_in"),
    (r"^proj_out", "final_layer.linear"),
    (r"^norm_out\.linear", "final_layer.adaLN_modulation.1"),
    (r"^transformer_blocks", "double_blocks"),
    (r"^single_transformer_blocks", "single_blocks"),
    (r"norm1\.linear", "img_mod.lin"),
    (r"norm1_context\.linear", "txt_mod.lin"),
    (r"(single_blocks\.\d+)\.norm\.linear", r"\1.modulation.lin"),
    (r"(single_blocks\.\d+)\.attn\.norm_q\.weight", r"\1.norm.query_norm.scale"),
    (r"(single_blocks\.\d+)\.attn\.norm_k\.weight", r"\1.norm.key_norm.scale"),
    (r"(single_blocks\.\d+)\.proj_out", r"\1.linear2"),
    (r"attn\.norm_q\.weight", "img_attn.norm.query_norm.scale"),
    (r"attn\.norm_k\.weight", "img_attn.norm.key_norm.scale"),
    (r"attn\.norm_added_q\.weight", "txt_attn.norm.query_norm.scale"),
    (r"attn\.norm_added_k\.weight", "txt_attn.norm.key_norm.scale"),
    (r"ff\.net\.0\.proj", "img_mlp.0"),
    (r"ff\.net\.2", "img_mlp.2"),
    (r"ff_context\.net\.0\.proj", "txt_mlp.0"),
    (r"ff_context\.net\.2", "txt_mlp.2"),
    (r"attn\.to_out\.0", "img_attn.proj"),
    (r"attn\.to_add_out", "txt_attn.proj"),
]
SD3_NAMES = [
    (r"^time_text_embed\.timestep_embedder\.linear_1", "t_embedder.mlp.0"),
    (r"^time_text_embed\.timestep_embedder\.linear_2", "t_embedder.mlp.2"),
    (r"^time_text_embed\.text_embedder\.linear_1", "y_embedder.mlp.0"),
    (r"^time_text_embed\.text_embedder\.linear_2", "y_embedder.mlp.2"),
    (r"^pos_embed\.pos_embed", "pos_embed"),
    (r"^pos_embed\.proj", "x_embedder.proj"),
    (r"^proj_out", "final_layer.linear"),
    (r"^norm_out\.linear", "final_layer.adaLN_modulation.1"),
    (r"^transformer_blocks", "joint_blocks"),
    (r"norm1\.linear", "x_block.adaLN_modulation.1"),
    (r"norm1_context\.linear", "context_block.adaLN_modulation.1"),
    (r"(attn2?)\.norm_([qk])\.", r"x_block.\1.ln_\2."),
    (r"attn\.norm_added_([qk])\.", r"context_block.attn.ln_\1."),
    (r"ff\.net\.0\.proj", "x_block.mlp.fc1"),
    (r"ff\.net\.2", "x_block.mlp.fc2"),
    (r"ff_context\.net\.0\.proj", "context_block.mlp.fc1"),
    (r"ff_context\.net\.2", "context_block.mlp.fc2"),
    (r"(attn2?)\.to_out\.0", r"x_block.\1.proj"),
    (r"attn\.to_add_out", "context_block.attn.proj"),
]
FLUX_2_NAMES = [
    (r"^time_guidance_embed\.timestep_embedder\.linear_1", "time_in.in_layer"),
    (r"^time_guidance_embed\.timestep_embedder\.linear_2", "time_in.out_layer"),
    (r"^time_guidance_embed\.guidance_embedder\.linear_1", "guidance_in.in_layer"),
    (r"^time_guidance_embed\.guidance_embedder\.linear_2", "guidance_in.out_layer"),
    (r"^(\w+_stream_modulation\w*)\.linear", r"\1.lin"),
    (r"attn\.to_qkv_mlp_proj", "linear1"),
    (r"^(single_transformer_blocks\.\d+)\.attn\.to_out", r"\1.linear2"),
    (r"^(single_transformer_blocks\.\d+)\.attn\.norm_q\.weight", r"\1.norm.query_norm.scale"),
    (r"^(single_transformer_blocks\.\d+)\.attn\.norm_k\.weight", r"\1.norm.key_norm.scale"),
    (r"ff\.linear_in", "img_mlp.0"),
    (r"ff\.linear_out", "img_mlp.2"),
    (r"ff_context\.linear_in", "txt_mlp.0"),
    (r"ff_context\.linear_out", "txt_mlp.2"),
    *[pair for pair in FLUX_NAMES if "time_text" not in pair[0] and "ff" not in pair[0]],
]
STREAM_NAMES = [
    (r"attention\.to_out\.0", "attention.out"),
    (r"attention\.norm_([qk])", r"attention.\1_norm"),
]
Z_IMAGE_NAMES = [(r"^all_(x_embedder|final_layer)\.2-1", r"\1"), *STREAM_NAMES]
LUMINA_2_NAMES = [
    (r"\.attn\.", ".attention."),
    (r"^time_caption_embed\.caption_embedder", "cap_embedder"),
    (r"^time_caption_embed\.timestep_embedder\.linear_1", "t_embedder.mlp.0"),
    (r"^time_caption_embed\.timestep_embedder\.linear_2", "t_embedder.mlp.2"),
    (r"^norm_out\.linear_1", "final_layer.adaLN_modulation.1"),
    (r"^norm_out\.linear_2", "final_layer.linear"),
    (r"feed_forward\.linear_", "feed_forward.w"),
    (r"\.norm1\.linear", ".adaLN_modulation.1"),
    (r"\.norm1(\.norm)?\.weight", ".attention_norm1.weight"),
    (r"\.norm2\.weight", ".attention_norm2.weight"),
    *STREAM_NAMES,
]
ALIKE_NAMES = [  # of PixArt's program, from which Sana's descends
    (r"^caption_projection\.linear_", "y_embedder.y_proj.fc"),
    (r"^proj_out", "final_layer.linear"),
    (r"^scale_shift_table", "final_layer.scale_shift_table"),
    (r"^transformer_blocks", "blocks"),
    (r"attn1\.to_out\.0", "attn.proj"),
    (r"attn2\.to_q\.", "cross_attn.q_linear."),
    (r"attn2\.to_out\.0", "cross_attn.proj"),
]
SANA_NAMES = [
    (r"^patch_embed\.proj", "x_embedder.proj"),
    (r"^time_embed\.emb\.timestep_embedder\.linear_1", "t_embedder.mlp.0"),
    (r"^time_embed\.emb\.timestep_embedder\.linear_2", "t_embedder.mlp.2"),
    (r"^time_embed\.linear", "t_block.1"),
    (r"^caption_norm", "attention_y_norm"),
    (r"attn1\.norm_([qk])", r"attn.\1_norm"),
    (r"attn2\.norm_([qk])", r"cross_attn.\1_norm"),
    (r"ff\.conv_inverted", "mlp.inverted_conv.conv"),
    (r"ff\.conv_depth", "mlp.depth_conv.conv"),
    (r"ff\.conv_point", "mlp.point_conv.conv"),
    *ALIKE_NAMES,
]
PIXART_NAMES = [
    (r"^pos_embed\.proj", "x_embedder.proj"),
    (r"^adaln_single\.emb\.timestep_embedder", "t_embedder"),
    (r"^adaln_single\.emb\.resolution_embedder", "csize_embedder"),
    (r"^adaln_single\.emb\.aspect_ratio_embedder", "ar_embedder"),
    (r"_embedder\.linear_1", "_embedder.mlp.0"),
    (r"_embedder\.linear_2", "_embedder.mlp.2"),
    (r"^adaln_single\.linear", "t_block.1"),
    (r"ff\.net\.0\.proj", "mlp.fc1"),
    (r"ff\.net\.2", "mlp.fc2"),
    *ALIKE_NAMES,
]
# those that are joined: the first of each, the others, and the name of all
FLUX_JOINED = [
    (r"^(single_blocks\.\d+\.)attn\.to_q\.", r"\1linear1.", ("attn.to_k", "attn.to_v", "proj_mlp")),
    (r"^(double_blocks\.\d+\.)attn\.to_q\.", r"\1img_attn.qkv.", ("attn.to_k", "attn.to_v")),
    (
        r"^(double_blocks\.\d+\.)attn\.add_q_proj\.",
        r"\1txt_attn.qkv.",
        ("attn.add_k_proj", "attn.add_v_proj"),
    ),
]
SD3_JOINED = [
    (r"^(joint_blocks\.\d+\.)attn\.to_q\.", r"\1x_block.attn.qkv.", ("attn.to_k", "attn.to_v")),
    (r"^(joint_blocks\.\d+\.)attn2\.to_q\.", r"\1x_block.attn2.qkv.", ("attn2.to_k", "attn2.to_v")),
    (
        r"^(joint_blocks\.\d+\.)attn\.add_q_proj\.",
        r"\1context_block.attn.qkv.",
        ("attn.add_k_proj", "attn.add_v_proj"),
    ),
]
STREAM_JOINED = [
    (
        r"^((?:layers|\w+_refiner)\.\d+\.attention\.)to_q\.",
        r"\1qkv.",
        ("to_k", "to_v"),
    )
]
ALIKE_JOINED = [
    (r"^(blocks\.\d+\.)attn1\.to_q\.", r"\1attn.qkv.", ("attn1.to_k", "attn1.to_v")),
    (r"^(blocks\.\d+\.)attn2\.to_k\.", r"\1cross_attn.kv_linear.", ("attn2.to_v",)),
]
NAMES = {
    "flux": (FLUX_NAMES, FLUX_JOINED),
    "sd3": (SD3_NAMES, SD3_JOINED),
    "klein": (FLUX_2_NAMES, FLUX_JOINED),
    "flux2": (FLUX_2_NAMES, FLUX_JOINED),
    "zimage": (Z_IMAGE_NAMES, STREAM_JOINED),
    "lumina2": (LUMINA_2_NAMES, STREAM_JOINED),
    "sana": (SANA_NAMES, ALIKE_JOINED),
    "pixart": (PIXART_NAMES, ALIKE_JOINED),
    "qwen": ([], []),  # diffusers took its authors' names
}
SPARE = {  # what their files have beside weights that diffusers has
    "zimage": {"norm_final.weight": (32,)},
    "lumina2": {"norm_final.weight": (32,)},
    "sana": {"pos_embed": (1, 64, 16), "y_embedder.y_embedding": (300, 20)},
    "pixart": {"pos_embed": (1, 16, 24), "y_embedder.y_embedding": (120, 20)},
    "pixart-sigma": {"pos_embed": (1, 16, 24), "y_embedder.y_embedding": (300, 20)},
}
LAST_TEXT = "joint_blocks.1.context_block.adaLN_modulation.1."
SWAPPED = {  # scale before shift
    **dict.fromkeys(("flux", "klein", "flux2"), ("final_layer.adaLN",)),
    "sd3": ("final_layer.adaLN", LAST_TEXT),
}


def kind_of(family):
    """The family of a tiny pipeline, which may be a variant."""
    return family.partition("-")[0]


def to_authors(family, folder):
    """The weights of a tiny pipeline's transformer as the authors' program keeps them."""
    names, joined = NAMES[kind_of(family)]
    tensors = rename(load_file(folder / TRANSFORMER), names, "")
    found = {}
    for name, value in tensors.items():
        for pattern, target, others in joined:
            if match := re.match(pattern, name):
                kind = name[match.end() :]
                parts = [value, *(tensors[f"{match[1]}{other}.{kind}"] for other in others)]
                name, value = match.expand(target) + kind, torch.cat(parts)
        found[name] = value
    gone = [f"{other}." for *_, others in joined for other in others]
    found = {name: value for name, value in found.items() if not any(map(name.count, gone))}
    for name, value in found.items():
        if name.startswith(SWAPPED.get(kind_of(family), ())):
            found[name] = torch.cat(value.chunk(2)[::-1])
    spare = SPARE.get(family, SPARE.get(kind_of(family), {}))
    return found | {name: torch.randn(shape) for name, shape in spare.items()}
