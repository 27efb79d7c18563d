#!/usr/bin/env bash
# Downloads the MSCOCO experiment into data/mscoco, or into the folder given: COCO's train images of 2017 and their captions
# from cocodataset.org; the published model, Fisher, latents, embeddings and samples from the hub. It can be interrupted:
# run it again to go on.
#
#   bash data/download_mscoco.sh
#   bash data/download_mscoco.sh /scratch/mscoco
#   HF_ENDPOINT=https://hf-mirror.com bash data/download_mscoco.sh       # a mirror of the hub
#   COCO_ENDPOINT=http://mirror/coco bash data/download_mscoco.sh        # a mirror of http://images.cocodataset.org
#   NEEDED_GB=200 bash data/download_mscoco.sh                           # where our estimate of the disk space is too high
#
# Its own files stand in FOLDER/.download: what is on its way, and done/, a marker for each finished archive and group.
set -euo pipefail

# Our estimate, not a published figure. Text embeddings 118,287 x 5 x 77 x 1024: 187 GB in float32 (half in float16), and as
# much again for their archive, which is kept until it is extracted; latents 118,287 x 2 x 4 x 16 x 16: 1 GB; the rest: 1 GB.
# COCO's images, 19 GB and their archive 19 GB, come when the other archives are gone.
NEEDED_GB=${NEEDED_GB:-380}
COCO_ENDPOINT=${COCO_ENDPOINT:-http://images.cocodataset.org}

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
root=${1:-$repository/data/mscoco}
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

def array_of(name):
    try:
        array = np.load(root / name, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        fail(f"{root / name}: not a complete .npy array ({error})")
    return array if array.ndim else array[None]

annotations, samples = "annotations/captions_train2017.json", "sample_caption.txt"
arrays = [f"coco17_{part}_{what}.npy" for part in ("train", "sample") for what in ("latents", "text_embeddings")]
for name in [annotations, *arrays, samples, "fisher_info.pt", "dataset.json", "unet/config.json", "unet/scheduler_config.json",
             "unet/model.bin"]:
    if not (root / name).is_file():
        fail(f"{root / name}: no such file")
try:
    content = json.loads((root / annotations).read_bytes())
    names, num_captions = [image["file_name"] for image in content["images"]], len(content["annotations"])
    if not all(isinstance(name, str) for name in names):
        raise TypeError("file_name")
except (ValueError, LookupError, TypeError) as error:
    fail(f"{root / annotations}: not COCO's caption annotations ({type(error).__name__}: {error})")
there = {entry.name for entry in os.scandir(root / "train2017")} if (root / "train2017").is_dir() else set()
missing = [name for name in names if name not in there]
if missing:
    fail(f"{root / 'train2017' / missing[0]}: no such file ({len(missing)} of the {len(names)} annotated images are missing)")
latents, embeddings, sample_latents, sample_embeddings = map(array_of, arrays)
if not len(latents) == 2 * len(embeddings) == 2 * len(names):
    fail(f"{root}: expected latents of two views of {len(names)} images and as many text embeddings, found {len(latents)} and "
         f"{len(embeddings)}")
num_samples = sum(1 for _ in open(root / samples, "rb"))
pictures = sum((root / f"sample/{number}.png").is_file() for number in range(num_samples))
if not pictures == num_samples == len(sample_latents) == len(sample_embeddings):
    fail(f"{root}: expected a picture, a latent and an embedding for each of the {num_samples} lines of {samples}, found {pictures} "
         f"pictures, {len(sample_latents)} latents and {len(sample_embeddings)} embeddings")

print(f"{root}: {len(names)} images with {num_captions} captions, {num_samples} samples")
print(f"latents {latents.shape} {latents.dtype}, text embeddings {embeddings.shape} {embeddings.dtype}")
print(f"next: python -m unlearn tasks --dataroot {root}")
EOF_PYTHON
}

layout_path() { # PATH on the hub -> path in the data root
    case $1 in
    mscoco) echo . ;;
    mscoco/*) echo "${1#mscoco/}" ;;
    *) echo "$1" ;;
    esac
}

fetch() { # URL FILE: downloads a file, going on where an interrupted download stopped
    local status=0
    "$curl" --fail --location --silent --show-error --retry 5 --continue-at - --output "$2.part" "$1" || status=$?
    if [ "$status" = 22 ] && [ -s "$2.part" ] && is_whole "$1" "$2.part"; then status=0; fi
    if [ "$status" = 33 ]; then rm -f -- "$2.part"; fi # a server that cannot go on: from the start next time
    if [ "$status" != 0 ]; then die "the download of $1 failed (see above); run the same command again to go on"; fi
    mv -- "$2.part" "$2"
}

is_whole() { # URL FILE: whether there is nothing more to come, which curl takes for an error
    local size
    size=$("$curl" --fail --location --silent --head "$1" | tr -d '\r' | awk 'tolower($1) == "content-length:" { print $2 }' | tail -1)
    [ "$size" = "$(wc -c <"$2" | tr -d ' ')" ]
}

unzip_members() { # ARCHIVE PREFIX FOLDER: members below PREFIX; fails where the archive is damaged
    "$python" - "$@" <<'EOF_PYTHON'
import shutil, sys, zipfile

archive, prefix, folder = sys.argv[1:]
try:
    with zipfile.ZipFile(archive) as file:  # never writes outside the folder, and checks every member's checksum
        members = [name for name in file.namelist() if name.startswith(prefix)]
        if not members:
            sys.exit(f"error: {archive}: holds no {prefix}")
        size, free = sum(file.getinfo(name).file_size for name in members), shutil.disk_usage(folder).free
        if size > free:
            sys.exit(f"error: {archive}: refused, nothing was extracted: it would take {size / 1e9:.1f} GB; {free / 1e9:.1f} GB are free")
        file.extractall(folder, members)
except OSError as error:
    sys.exit(f"error: {archive}: could not be extracted into {folder} ({error.strerror}); run the same command again to go on")
except (zipfile.BadZipFile, EOFError, ValueError, RuntimeError, NotImplementedError, __import__("zlib").error):
    sys.exit(9)
EOF_PYTHON
}

coco() { # NAME of a zip archive below COCO's folder, MEMBER: downloads it and moves its member to its place
    local archive=$work/${1##*/} status=0
    if [ -e "$work/done/${1##*/}" ]; then return; fi
    echo "downloading $2 from $COCO_ENDPOINT/$1"
    if [ ! -e "$archive" ]; then fetch "$COCO_ENDPOINT/$1" "$archive"; fi
    rm -rf -- "$work/extracting"
    mkdir -p "$work/extracting"
    unzip_members "$archive" "$2" "$work/extracting" || status=$?
    if [ "$status" = 9 ]; then
        rm -f -- "$archive"
        die "$1: damaged or incomplete, it was removed; run the same command again to download it anew"
    fi
    if [ "$status" != 0 ]; then exit 2; fi
    place "$work/extracting/$2" "$root/$2" || exit 2
    touch "$work/done/${1##*/}"
    rm -f -- "$archive"
}

configure() { # lays out what stands in this repository: settings, the UNet's and the schedule's configuration
    local file
    mkdir -p "$root/unet"
    for file in dataset.json unet/config.json unet/scheduler_config.json; do
        if [ ! -e "$root/$file" ]; then cp -- "$repository/data/mscoco_config/$file" "$root/$file"; fi
    done
    if [ -e "$root/model.bin" ]; then place "$root/model.bin" "$root/unet/model.bin" || exit 2; fi
}

main() {
    python=$(find_python) || die "Python with numpy is needed: python -m pip install numpy"
    if { [ ! -e "$work" ] || [ -e "$work/done/everything" ]; } && verify 2>/dev/null; then return; fi
    curl=$(find_tool curl) || die "curl is needed: apt install curl"
    find_tools curl
    coco annotations/annotations_trainval2017.zip annotations/captions_train2017.json
    group "model, Fisher, latents, embeddings and samples" sywang/AttributeByUnlearning 'mscoco/*'
    configure
    coco zips/train2017.zip train2017
    verify || exit 2
    touch "$work/done/everything"
}

main
