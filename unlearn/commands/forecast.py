"""What the doctor says of what runs will need, by a model's configuration alone."""

from argparse import Namespace
from pathlib import Path

import psutil
import torch

from ..front.needs import Needs, describe_bytes, find_needs
from ..models.architectures import read_architecture
from ..models.precision import WEIGHTS
from ..runtime.programs import choose_device
from .examination import pipeline_folder
from .machine import NOTE, OK, Finding, memory_limit, try_out

# What is told of: output takes what exact takes.
WORDS = {"removal": "--scoring removal", "exact": "unlearning a picture"}


def examine_needs(args: Namespace, settings: dict) -> list[Finding]:
    """What a run takes by removal and by unlearning, and whether this machine has it; nothing of a
    model whose configurations are not there, or cannot be used, which others tell."""
    pipeline = args.sd_version or settings["pipeline"]
    folder = pipeline_folder(pipeline)
    if folder is None or not Path(folder).is_dir():
        return []
    architecture, problem = try_out(read_architecture, folder, settings["unet"])
    if problem:
        return []
    lora = bool(args.lora or settings["lora"])
    weights = args.weights or settings["weights"]
    if weights not in WEIGHTS:
        return []
    findings = []
    for scoring, words in WORDS.items():
        how = architecture, settings["resolution"], scoring, lora, weights
        needs, problem = try_out(find_needs, *how)
        if problem:
            return []
        findings.append(tell_needs(needs, words, args.device))
    return findings


def tell_needs(needs: Needs, scoring: str, device: str | None) -> Finding:
    """What a way of scoring takes, and whether this machine has it."""
    found, problem = try_out(choose_device, device)
    text = f"{scoring}: {needs.describe()}; {needs.image_bytes / 1e6:.2f} MB on the disk an image"
    if needs.caption_bytes:
        text += f" and {needs.caption_bytes / 1e6:.2f} MB a different caption"
    if problem is None and found.type == "cuda":
        there, needed = torch.cuda.mem_get_info(found)[1], needs.device_bytes
    else:
        there, needed = min(psutil.virtual_memory().available, memory_limit()), needs.cpu
    if needed > there:
        return Finding(NOTE, text, f"{describe_bytes(there)} are there: take a larger machine")
    return Finding(OK, text)
