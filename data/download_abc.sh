#!/usr/bin/env bash
# Downloads the AbC benchmark into data/abc, or into the folder given. It can be interrupted: run it again to go on.
#
#   bash data/download_abc.sh
#   bash data/download_abc.sh /scratch/abc
#   HF_ENDPOINT=https://hf-mirror.com bash data/download_abc.sh     # a mirror of the hub
#   NEEDED_GB=60 bash data/download_abc.sh                          # where our estimate of the disk space is too high
#
# Its own files stand in FOLDER/.download: what is on its way, and done/, a marker for each finished archive and group.
set -euo pipefail

# Our estimate, not a published figure. LAION latents 100,000 x 2 x 4 x 64 x 64 float16: 6.6 GB; text embeddings
# 100,000 x 77 x 768 float16: 11.8 GB; Fisher: up to 6.9 GB; LAION images: about 10 GB; models (77 MB each), exemplars
# and synthesized images: about 40 GB; and the archives of the largest group, kept until they are extracted: 30 GB.
NEEDED_GB=${NEEDED_GB:-105}

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
root=${1:-$repository/data/abc}
work=$root/.download
source "$repository/data/download_common.sh"

verify() { # checks what the data root holds and prints a summary; fails with one line where something is missing
    "$python" - "$root" <<'EOF_PYTHON'
import json, os, sys
from pathlib import Path
import numpy as np

root = Path(sys.argv[1])

def fail(text):
    sys.exit(f"error: {text}; to download it again, delete {root / '.download'} and run the same command")

def entries_of(path):
    try:
        entries = json.loads(path.read_bytes())
        listed = [name for entry in entries for name in sum(entry["synth"].values(), list(entry["exemplar"]))]
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

tests = [f"json/test_{name}.json" for name in ("artchive", "bamfg", "observed_imagenet", "unobserved_imagenet")]
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
    fail(f"{missing[0]}: no such file ({len(missing)} of the {len(listed)} that json/test_*.json names are missing)")
latents, embeddings = map(array_of, arrays)
if len(latents) != 2 * len(embeddings):
    fail(f"{root}: expected twice as many latents as text embeddings, found {len(latents)} and {len(embeddings)}")
num_images = sum(entry.is_file() for entry in os.scandir(root / "laion_subset/images"))
num_captions = sum(1 for _ in open(root / "laion_subset/captions.txt", "rb"))
if num_images != num_captions:
    fail(f"{root / 'laion_subset'}: expected as many images as captions, found {num_images} and {num_captions}")

print(f"{root}: {num_models} customized models with {len(listed)} images, {num_images} LAION images")
print(f"latents {latents.shape} {latents.dtype}, text embeddings {embeddings.shape} {embeddings.dtype}")
print(f"next: python -m unlearn tasks --dataroot {root}")
EOF_PYTHON
}

layout_path() { # PATH on the hub -> path in the data root
    case $1 in
    synth_test | synth_test/*) echo "synth${1#synth_test}" ;;
    models_test | models_test/*) echo "models${1#models_test}" ;;
    abc) echo . ;;
    abc/*) echo "${1#abc/}" ;;
    *) echo "$1" ;;
    esac
}

main() {
    python=$(find_python) || die "Python with numpy is needed: python -m pip install numpy"
    if { [ ! -e "$work" ] || [ -e "$work/done/everything" ]; } && verify 2>/dev/null; then return; fi
    find_tools

    group "json and images" sywang/GenDataAttribution 'json/test_*' path_to_prompts.json \
        imagenet_class_to_categories.json 'exemplar/*' 'synth_test/*'
    group models sywang/GenDataAttribution 'models_test/*'
    group "LAION subset" sywang/GenDataAttribution 'laion_subset/*'
    group "latents, embeddings and Fisher" sywang/AttributeByUnlearning 'abc/*'
    verify || exit 2
    touch "$work/done/everything"
}

main
