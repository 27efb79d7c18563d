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
    "$python" "$repository/data/download/verify_abc.py" "$root"
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
