"""Checks what the data root of the MSCOCO experiment holds and prints a summary; ends with one line
where something is missing.

python verify_mscoco.py ROOT
"""

import json
import os
import sys
from pathlib import Path

import numpy as np

root = Path(sys.argv[1])


def fail(text):
    sys.exit(
        f"error: {text}; to download it again, delete {root / '.download'} and run the same command"
    )


def array_of(name):
    try:
        array = np.load(root / name, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        fail(f"{root / name}: not a complete .npy array ({error})")
    return array if array.ndim else array[None]


annotations, samples = "annotations/captions_train2017.json", "sample_caption.txt"
arrays = [
    f"coco17_{part}_{what}.npy"
    for part in ("train", "sample")
    for what in ("latents", "text_embeddings")
]
for name in [
    annotations,
    *arrays,
    samples,
    "fisher_info.pt",
    "dataset.json",
    "unet/config.json",
    "unet/scheduler_config.json",
    "unet/model.bin",
]:
    if not (root / name).is_file():
        fail(f"{root / name}: no such file")
try:
    content = json.loads((root / annotations).read_bytes())
    names = [image["file_name"] for image in content["images"]]
    num_captions = len(content["annotations"])
    if not all(isinstance(name, str) for name in names):
        raise TypeError("file_name")
except (ValueError, LookupError, TypeError) as error:
    fail(f"{root / annotations}: not COCO's caption annotations ({type(error).__name__}: {error})")
there = (
    {entry.name for entry in os.scandir(root / "train2017")}
    if (root / "train2017").is_dir()
    else set()
)
missing = [name for name in names if name not in there]
if missing:
    fail(
        f"{root / 'train2017' / missing[0]}: no such file ({len(missing)} of the {len(names)} "
        f"annotated images are missing)"
    )
latents, embeddings, sample_latents, sample_embeddings = map(array_of, arrays)
if not len(latents) == 2 * len(embeddings) == 2 * len(names):
    fail(
        f"{root}: expected latents of two views of {len(names)} images and as many text "
        f"embeddings, found {len(latents)} and "
        f"{len(embeddings)}"
    )
num_samples = sum(1 for _ in open(root / samples, "rb"))
pictures = sum((root / f"sample/{number}.png").is_file() for number in range(num_samples))
if not pictures == num_samples == len(sample_latents) == len(sample_embeddings):
    fail(
        f"{root}: expected a picture, a latent and an embedding for each of the {num_samples} "
        f"lines of {samples}, found {pictures} "
        f"pictures, {len(sample_latents)} latents and {len(sample_embeddings)} embeddings"
    )

print(f"{root}: {len(names)} images with {num_captions} captions, {num_samples} samples")
print(
    f"latents {latents.shape} {latents.dtype}, text embeddings {embeddings.shape} "
    f"{embeddings.dtype}"
)
print(f"next: python -m unlearn tasks --dataroot {root}")
