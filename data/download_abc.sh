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

die() {
    echo "error: $*" >&2
    exit 2
}

find_tool() { # NAME...: the first of these programs that there is
    local name
    for name in "$@"; do
        if command -v "$name"; then return; fi
    done
    return 1
}

find_python() {
    local name
    for name in python python3 "$repository/.venv/bin/python"; do
        if "$name" -c "import numpy" 2>/dev/null; then echo "$name" && return; fi
    done
    return 1
}

check_disk() {
    local used_gb free_gb
    used_gb=$(($(du -sk "$root" | cut -f1) / 1000000))
    free_gb=$(($(df -Pk "$root" | awk 'NR == 2 { print $4 }') / 1000000))
    if ((used_gb + free_gb < NEEDED_GB)); then
        die "$root: about $((NEEDED_GB - used_gb)) GB more are needed, $free_gb GB are free; give another folder as" \
            "the first argument, or set NEEDED_GB if you know better"
    fi
}

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

refuse_escapes() { # LISTING ARCHIVE: refuses members that would be written, or would point, outside the target
    "$python" - "$@" "$seven" <<'EOF_PYTHON'
import re, subprocess, sys

listing, archive, seven = sys.argv[1:]

def refuse(member, reason):
    sys.exit(f"error: {archive}: refused, nothing was extracted: member {member!r} {reason}")

def leaves(path):
    return re.match(r"[\\/]|[A-Za-z]:", path) or ".." in re.split(r"[\\/]", path)

def link_target(fields):
    command = [seven, "e", "-so", "-spd", "-p-", "--", archive, fields["Path"]]
    content = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True).stdout
    return fields.get("Symbolic Link") or content.decode(errors="replace")

text = open(listing, encoding="utf-8", errors="surrogateescape", newline="\n").read()
header, rule, members = text.partition("\n----------\n")
if not rule:
    sys.exit(f"error: {archive}: refused, nothing was extracted: {seven} lists no members")
for block in filter(None, members.strip("\n").split("\n\n")):
    lines = [line.partition(" =") for line in block.strip("\n").split("\n")]
    fields = {name: value.strip(" ") for name, _, value in lines}
    if lines[0][0] != "Path" or len(fields) != len(lines) or not all(mark for _, mark, _ in lines):
        refuse(lines[0][2], "has a name of more than one line")
    if leaves(fields["Path"]):
        refuse(fields["Path"], "would leave the target")
    if fields.get("Hard Link"):
        refuse(fields["Path"], "is a hard link")
    if "l" in fields.get("Attributes", "").lower() and leaves(target := link_target(fields) or ".."):
        refuse(fields["Path"], f"is a link that points out of its folder, to {target!r}")
EOF_PYTHON
}

# place SOURCE TARGET [STEM WRAPPER...]: moves a file or folder by renaming; what stands there already must be the same.
# For the content of an archive: STEM is the archive's name, WRAPPERs are the folders on the way to it.
place() {
    "$python" - "$root" "$@" <<'EOF_PYTHON'
import filecmp, os, sys
from pathlib import Path

root, source, target = map(Path, sys.argv[1:4])
stem, wrappers = "".join(sys.argv[4:5]), {"dataset", "data", "abc", *sys.argv[5:]}

def same(source, target):
    if source.is_symlink() or target.is_symlink():
        return source.is_symlink() and target.is_symlink() and os.readlink(source) == os.readlink(target)
    return source.is_file() and target.is_file() and filecmp.cmp(source, target, shallow=False)

def merge(source, target):
    if not os.path.lexists(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        source.rename(target)
    elif source.is_dir() and not source.is_symlink() and target.is_dir():
        for child in sorted(source.iterdir()):
            merge(child, target / child.name)
        source.rmdir()
    elif same(source, target):
        source.unlink()
    else:
        sys.exit(f"error: {target}: is there and is not the benchmark's; move it away and run the same command again")

def inner_folder(folder):
    """The one folder inside that only repeats a name of the way to it, as synth_test in synth_test/imagenet/..."""
    children = list(folder.iterdir())
    wrapped = len(children) == 1 and children[0].name in wrappers and children[0].is_dir()
    return children[0] if wrapped and not children[0].is_symlink() else None

def names_a_folder(stem):
    """Whether an archive's own name is a folder of the layout (images.7z, imagenet.7z)."""
    lists = [*root.glob("json/test_*.json"), *root.glob(".download/*/json/test_*.json")]
    return stem == "images" or any(f"/{stem}/" in path.read_text() for path in lists)

if stem:
    while inner := inner_folder(source):
        source = inner
    if stem not in wrappers and names_a_folder(stem) and not (source / stem).exists():
        target = target / stem
try:
    merge(source, target)
except OSError as error:
    sys.exit(f"error: {error.filename2 or error.filename or target}: cannot be written ({error.strerror})")
EOF_PYTHON
}

damaged() { # NAME: says why an archive could not be extracted; removes its volumes where they are to blame
    if "$seven" t -p- -bso0 -bsp0 -- "$(first_volume "$1")" </dev/null 2>/dev/null; then
        die "$1: could not be extracted into $work (is the disk full?); run the same command again to go on"
    fi
    remove_volumes "$1"
    die "$1: damaged or incomplete, its volumes were removed; run the same command again to download them anew"
}

first_volume() { if [ -e "$hub/$1.001" ]; then echo "$hub/$1.001"; else echo "$hub/$1"; fi; }
remove_volumes() { rm -f -- "$hub/$1" "$hub/$1".[0-9][0-9][0-9]; }
marker() { echo "$work/done/$repo_name%${1//\//%}"; }

unpack() { # NAME of an archive, as on the hub without its volume's number
    local name=$1 archive target folders
    archive=$(first_volume "$name")
    target=$(dirname "$(layout_path "$name")")
    IFS=/ read -ra folders <<<"$(dirname "$name")/$target"
    echo "extracting $name"
    rm -rf -- "$work/extracting"
    mkdir -p "$work/extracting"
    "$seven" l -slt -p- -- "$archive" </dev/null >"$work/listing.txt" 2>&1 || damaged "$name"
    refuse_escapes "$work/listing.txt" "$archive" || exit 2
    "$seven" x -y -p- -bso0 -bsp0 -o"$work/extracting" -- "$archive" </dev/null || damaged "$name"
    place "$work/extracting" "$root/$target" "$(basename "$name" .7z)" "${folders[@]}" || exit 2
    touch "$(marker "$name")"
    remove_volumes "$name"
}

archives() { # names of the archives that have come, as on the hub
    (cd "$hub" && find . -path ./.cache -prune -o -type f \( -name '*.7z' -o -name '*.7z.001' \) -print) |
        sed -e 's|^\./||' -e 's|\.001$||' | sort
}

download() { # REPOSITORY PATTERN...: what matches and was not extracted yet, into $hub
    local patterns=() pattern mark
    for pattern in "${@:2}"; do patterns+=(--include "$pattern"); done
    for mark in "$work/done/$repo_name%"*.7z; do
        mark=${mark#"$work/done/$repo_name%"}
        if [ "$mark" != "*.7z" ]; then patterns+=(--exclude "${mark//%//}*"); fi
    done
    local command=("$hf" download "$1" --repo-type dataset --local-dir "$hub" "${patterns[@]}")
    "${command[@]}" || die "the download from $1 failed (see above); run the same command again to go on"
    # hf succeeds without a network where the folder holds anything: ask again what is missing, which needs the network.
    "${command[@]}" --dry-run >"$work/listing.txt" || die "$1 cannot be reached; run the same command again to go on"
    grep -q "Will download 0 files" "$work/listing.txt" ||
        die "$1: files are still missing; run the same command again to go on"
}

group() { # NAME REPOSITORY PATTERN...: downloads what matches, extracts it, moves it to its place
    local names name item repo_name=${2#*/}
    local hub=$work/$repo_name
    if [ -e "$work/done/$1" ]; then return; fi
    echo "downloading $1 from $2"
    mkdir -p "$hub"
    find "$hub" -name '*.????????.incomplete' -delete # left by a killed hf, which never goes on with them
    download "${@:2}"
    mapfile -t names < <(archives)
    for name in "${names[@]}"; do
        if [ -e "$(marker "$name")" ]; then remove_volumes "$name"; else unpack "$name"; fi
    done
    for item in "$hub"/*; do
        if [ -e "$item" ]; then place "$item" "$root/$(layout_path "$(basename "$item")")" || exit 2; fi
    done
    touch "$work/done/$1"
}

main() {
    python=$(find_python) || die "Python with numpy is needed: python -m pip install numpy"
    if { [ ! -e "$work" ] || [ -e "$work/done/everything" ]; } && verify 2>/dev/null; then return; fi
    echo "needs: hf (huggingface_hub), 7z, about $NEEDED_GB GB of disk in $root (with what it holds already)"
    hf=$(find_tool hf "$repository/.venv/bin/hf") || die "hf is needed: python -m pip install huggingface_hub"
    seven=$(find_tool 7z 7zz 7za) || die "7z is needed: apt install 7zip, or conda install -c conda-forge p7zip"
    { mkdir -p "$work/done" && [ -w "$work" ]; } 2>/dev/null || die "$root: cannot be written"
    exec 9>"$work/lock"
    if command -v flock >/dev/null; then flock -n 9 || die "$root: another download into it is running"; fi
    check_disk

    group "json and images" sywang/GenDataAttribution 'json/test_*' path_to_prompts.json \
        imagenet_class_to_categories.json 'exemplar/*' 'synth_test/*'
    group models sywang/GenDataAttribution 'models_test/*'
    group "LAION subset" sywang/GenDataAttribution 'laion_subset/*'
    group "latents, embeddings and Fisher" sywang/AttributeByUnlearning 'abc/*'
    verify || exit 2
    touch "$work/done/everything"
}

main
