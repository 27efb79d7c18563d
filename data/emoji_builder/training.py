"""What the training stages share: seeded batches, checkpoints that appear whole, progress."""

import os
from pathlib import Path

import torch
from tqdm import tqdm


def Progress(iterable, name):
    """A progress bar named after its stage."""
    return tqdm(iterable, desc=name, mininterval=5, unit="step", smoothing=0.05)


def batch_generator(seed, step):
    """The random numbers of one training step: a resumed run draws what an uninterrupted one
    does."""
    return torch.Generator().manual_seed(seed * 10_000_019 + step)


def flip_half(batch, generator):
    """Mirrors each image of [batch, c, h, w] with probability one half."""
    mirrored = torch.rand(len(batch), generator=generator) < 0.5
    return torch.where(mirrored[:, None, None, None], batch.flip(-1), batch)


def save_checkpoint(path, modules, optimizer, step):
    """Writes modules and optimizer whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {
        "modules": {name: module.state_dict() for name, module in modules.items()},
        "optimizer": optimizer.state_dict(),
        "step": step,
    }
    torch.save(state, f"{path}.part")
    os.replace(f"{path}.part", path)


def load_checkpoint(path, modules, optimizer):
    """Restores in place what `save_checkpoint` wrote. Returns the next step; 0 where there is no
    checkpoint."""
    if not Path(path).exists():
        return 0
    state = torch.load(path, weights_only=True)
    for name, module in modules.items():
        module.load_state_dict(state["modules"][name])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]
