"""A pipeline's folder put together of links to what is there; only weights that cannot be linked are
written anew."""

import os
import shutil
from pathlib import Path

from ..errors import UserError
from ..models.weights import INDEX, WEIGHTS, is_wrapped
from ..storage.artifacts import own_part, write_json, write_tensors
from ..storage.hashes import digest
from ..storage.reading import list_visible, read_json, read_tensors


def assemble(
    folder: Path, place: Path, weights: dict[str, Path], parts: dict[str, Path], index: dict
) -> Path:
    """A folder of links in `place`, named after what it is made of: parts from `parts`, else from
    `folder`, and the weights given under the names that are loaded."""
    stamps = {
        part: [str(path), path.stat().st_size, path.stat().st_mtime_ns]
        for part, path in weights.items()
    }
    target = place / f"{folder.name}-{digest(str(folder), stamps, index)[:8]}"
    if (target / INDEX).is_file():
        return target
    for part, value in index.items():
        source = parts.get(part) or folder / part
        if not isinstance(value, list) or not source.is_dir():
            continue
        (target / part).mkdir(parents=True, exist_ok=True)
        for path in list_visible(source):
            if part not in weights or path.suffix in (".json", ".txt", ".model"):
                link(path, target / part / path.name)
        if part in weights:
            put_weights(weights[part], target / part / f"{WEIGHTS[part][0]}.safetensors")
    write_json(target / INDEX, index)  # last: it says that the folder is whole
    return target


def finish_folder(part: Path, target: Path) -> None:
    """Gives a pipeline's folder that is whole its final name; where another process was first, its
    folder, which is the same, stays."""
    try:
        os.replace(part, target)
    except OSError:
        if not (target / INDEX).is_file():
            raise
        shutil.rmtree(part, ignore_errors=True)


def link(source: Path, target: Path) -> None:
    """A link to a file, whatever stood there."""
    part = own_part(target)
    part.unlink(missing_ok=True)
    os.symlink(os.path.realpath(source), part)
    os.replace(part, target)


def put_weights(source: Path, target: Path) -> None:
    """Weights as safetensors: a link where they are, else read without running code and written."""
    if source.suffix == ".safetensors" and not is_wrapped(source):
        return link(source, target)
    if ".safetensors.index" in source.name:
        return put_shards(source, target)
    tensors = read_tensors(source, "--model")
    # Each its own memory: tied weights may not share theirs in such a file.
    write_tensors(target, {name: tensor.contiguous().clone() for name, tensor in tensors.items()})


def put_shards(source: Path, target: Path) -> None:
    """Links to weights that an index (.json) says are in several files."""
    index = read_json(source, "--model")
    files = index.get("weight_map") if isinstance(index, dict) else None
    names = set(files.values()) if isinstance(files, dict) else set()
    for name in sorted(map(str, names)):
        if Path(name).name != name or not (source.parent / name).is_file():
            raise UserError(f"--model {source}: names {name!r:.80}, which is not there")
        link(source.parent / name, target.with_name(name))
    link(source, target.with_name(f"{target.name}.index.json"))
