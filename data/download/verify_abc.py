"""Checks what the data root of the AbC benchmark holds and prints a summary; ends with one line
where something is missing.

python verify_abc.py ROOT
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


def entries_of(path):
    try:
        entries = json.loads(path.read_bytes())
        listed = [
            name
            for entry in entries
            for name in sum(entry["synth"].values(), list(entry["exemplar"]))
        ]
        if not all(isinstance(name, str) for name in listed):
            raise TypeError("a path that is no text")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        fail(f"{path}: not a list of customized models ({type(error).__name__}: {error})")
    return len(entries), [root / name.removeprefix("dataset/") for name in listed]


def array_of(name):
    try:
        return np.load(root / name, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        fail(f"{root / name}: not a complete .npy array ({error})")


tests = [
    f"json/test_{name}.json"
    for name in ("artchive", "bamfg", "observed_imagenet", "unobserved_imagenet")
]
arrays = ["laion_latents.npy", "laion_text_embeddings.npy"]
for name in [*tests, *arrays, "path_to_prompts.json", "laion_subset/captions.txt", "sd_fisher.pt"]:
    if not (root / name).is_file():
        fail(f"{root / name}: no such file")
for name in ("exemplar", "synth", "models", "laion_subset/images"):
    if not (root / name).is_dir() or not any((root / name).iterdir()):
        fail(f"{root / name}: no such folder, or an empty one")

num_models, listed = 0, []
for name in tests:
    count, paths = entries_of(root / name)
    num_models, listed = num_models + count, listed + paths
missing = [path for path in listed if not path.is_file()]
if missing:
    fail(
        f"{missing[0]}: no such file ({len(missing)} of the {len(listed)} that json/test_*.json "
        f"names are missing)"
    )
latents, embeddings = map(array_of, arrays)
if len(latents) != 2 * len(embeddings):
    fail(
        f"{root}: expected twice as many latents as text embeddings, found {len(latents)} and "
        f"{len(embeddings)}"
    )
num_images = sum(
    entry.is_file() and not entry.name.startswith(".")
    for entry in os.scandir(root / "laion_subset/images")
)
num_captions = sum(1 for _ in open(root / "laion_subset/captions.txt", "rb"))
if num_images != num_captions:
    fail(
        f"{root / 'laion_subset'}: expected as many images as captions, found {num_images} and "
        f"{num_captions}"
    )

print(
    f"{root}: {num_models} customized models with {len(listed)} images, {num_images} LAION images"
)
print(
    f"latents {latents.shape} {latents.dtype}, text embeddings {embeddings.shape} "
    f"{embeddings.dtype}"
)
print(f"next: python -m unlearn tasks --dataroot {root}")
