# Shared by the download scripts, which source it after they set: repository, root, work, NEEDED_GB, and define
# layout_path, from a path on the hub to one in the data root. Not to be run alone.

case ${1:-} in
-h | --help) sed -n '2,/^set/{s/^# \{0,1\}//p}' "$0" && exit ;;
-*) echo "error: $1: unknown option; expected a folder or --help" >&2 && exit 2 ;;
esac

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

refuse_escapes() { # LISTING ARCHIVE: refuses members that would be written, or would point, outside the target, or fill the disk
    "$python" "$repository/data/download/refuse_escapes.py" "$@" "$seven" "$root"
}

# place SOURCE TARGET [STEM WRAPPER...]: moves a file or folder by renaming; what stands there already must be the same.
# For the content of an archive: STEM is the archive's name, WRAPPERs are the folders on the way to it.
place() {
    "$python" "$repository/data/download/place.py" "$root" "$@"
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

find_tools() { # finds what every download needs, checks disk and permissions, keeps a second download out
    echo "needs: hf (huggingface_hub), 7z${1:+, $1}, about $NEEDED_GB GB of disk in $root (with what it holds already)"
    hf=$(find_tool hf "$repository/.venv/bin/hf") || die "hf is needed: python -m pip install huggingface_hub"
    seven=$(find_tool 7z 7zz 7za) || die "7z is needed: apt install 7zip, or conda install -c conda-forge p7zip"
    { mkdir -p "$work/done" && [ -w "$work" ]; } 2>/dev/null || die "$root: cannot be written"
    exec 9>"$work/lock"
    if command -v flock >/dev/null; then flock -n 9 || die "$root: another download into it is running"; fi
    check_disk
}
