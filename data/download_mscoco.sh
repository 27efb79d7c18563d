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
    "$python" "$repository/data/download/verify_mscoco.py" "$root"
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
    "$python" "$repository/data/download/unzip_members.py" "$@"
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
