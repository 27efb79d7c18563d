"""Noise that belongs to the image, and the timestep grid.

The noise of (seed, data set, image) comes from NumPy's counter-based Philox generator: its key is a
hash of the three, its counter holds (view, caption, timestep, draw). So the numbers do not depend
on device, batch, subset, order or process, and a finer grid of timesteps contains the noise of a
coarser one.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch

from .errors import UserError

SCHEME = "philox-per-image"
KNOWN_ANSWER = "644d08b7a91a864c"  # `known_answer` of every NumPy that this project was tested with


def image_generator(seed: int, dataset_id: str, image_id: str) -> np.random.Philox:
    """A Philox bit generator keyed by seed, data set and image. Move it with `seek`."""
    key = hashlib.blake2b(
        repr((int(seed), str(dataset_id), str(image_id))).encode(), digest_size=16
    ).digest()
    return np.random.Philox(key=np.frombuffer(key, np.uint64))


def seek(generator: np.random.Philox, view: int, caption: int, timestep: int, draw: int) -> None:
    """Moves a generator, in place, to the start of the stream of (view, caption, timestep,
    draw)."""
    state = generator.state
    # Word 0 counts the blocks within the stream; the streams differ in the other three words.
    state["state"]["counter"] = np.array([0, view | caption << 32, timestep, draw], np.uint64)
    state["buffer_pos"], state["has_uint32"] = 4, 0
    generator.state = state


def image_noise(
    seed: int,
    dataset_id: str,
    image_id: str,
    slots: Sequence[tuple[int, int, int, int]],
    shape: Sequence[int],
) -> np.ndarray:
    """Standard normals of one image: [len(slots), *shape] float32, one row a slot (view, caption,
    timestep, draw)."""
    bits = image_generator(seed, dataset_id, image_id)
    normals, generator = np.empty((len(slots), *shape), np.float32), np.random.Generator(bits)
    for number, slot in enumerate(slots):
        seek(bits, *slot)
        generator.standard_normal(out=normals[number], dtype=np.float32)
    return normals


def known_answer() -> str:
    """Hash of a fixed piece of noise: NumPy promises its normal streams for one build only."""
    noise = image_noise(0, "known answer", "image", [(0, 0, 0, 0), (1, 2, 900, 3)], (64,))
    return hashlib.blake2b(noise.tobytes(), digest_size=8).hexdigest()


def identity() -> dict:
    """What decides which numbers a seed stands for, for records."""
    return {"noise": SCHEME, "known_answer": known_answer()}


def batch_noise(batch_index: int, shape: Sequence[int], device: torch.device | str) -> torch.Tensor:
    """[AbU]'s published program: normals of one batch from a torch generator on the scoring device,
    seeded by the index of the batch. Another batch size or device gives other noise; only `--compat
    abu` uses it."""
    generator = torch.Generator(device).manual_seed(batch_index)
    return torch.randn(shape, generator=generator, device=device)


def timestep_grid(
    time_samples: int, num_train_timesteps: int, flag: str = "--time_samples"
) -> list[int]:
    """Timesteps 0, stride, 2 stride, ... with stride = num_train_timesteps / time_samples.
    Raises UserError, naming `flag`, where that is no whole number. Source: [AbU] section 4."""
    if time_samples < 1 or num_train_timesteps % time_samples:
        raise UserError(
            f"{flag} {time_samples}: must divide the model's {num_train_timesteps} training "
            f"timesteps"
        )
    return list(range(0, num_train_timesteps, num_train_timesteps // time_samples))
