"""The layers of a UNet as the original code of Stable Diffusion names them, which counts blocks of
resolutions through: input_blocks.4.1 is the first attention of the second resolution.

kohya's LoRA of Stable Diffusion XL have these names, those of 1 and 2 diffusers'.
"""

import re
from typing import Any

import torch

from .interface import Original

RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
OUTSIDE = {  # of blocks
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
MIDDLE = {"resnets.0": 0, "attentions.0": 1, "resnets.1": 2}
BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)")


def name_layers(unet: Any) -> dict[str, Original]:
    """The layers of a UNet by their original names; none where its blocks are not all alike."""
    count = unet.config.layers_per_block
    if not isinstance(count, int):
        return {}
    attended = [bool(getattr(block, "attentions", ())) for block in unet.up_blocks]
    names = {}
    for name, layer in unet.named_modules():
        if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d)):
            if original := find_name(name, count, attended):
                names[original] = Original((name,))
    return names


def find_name(name: str, count: int, attended: list[bool]) -> str | None:
    """The original name of a layer of a UNet with so many layers a block; None where it has none.
    attended: of each block on the way up, whether it has attention."""
    if name in OUTSIDE:
        return OUTSIDE[name]
    head, _, rest = name.partition(".")
    if head == "mid_block":
        kind, number, inner = rest.split(".", 2)
        block = f"middle_block.{MIDDLE[f'{kind}.{number}']}"
    elif match := BLOCK.match(name):
        inner = name[match.end() + 1 :]
        block, kind = find_block(match, count, attended), match[3]
    else:
        return None
    if kind == "downsamplers":
        inner = "op"
    return f"{block}.{RESNET.get(inner, inner) if kind == 'resnets' else inner}"


def find_block(match: re.Match, count: int, attended: list[bool]) -> str:
    """The original name of the block that a match of BLOCK is of."""
    resolution, kind, number = int(match[2]), match[3], int(match[4])
    if kind == "downsamplers":
        return f"input_blocks.{(resolution + 1) * (count + 1)}.0"
    if kind == "upsamplers":
        return f"output_blocks.{resolution * (count + 1) + count}.{1 + attended[resolution]}"
    place = int(kind == "attentions")
    if match[1] == "down":
        return f"input_blocks.{1 + resolution * (count + 1) + number}.{place}"
    return f"output_blocks.{resolution * (count + 1) + number}.{place}"
