"""The file of a transformer alone, as its authors, ComfyUI and diffusers have it, put beside the other
parts of a pipeline's folder."""

import re
import shlex
from collections.abc import Mapping
from pathlib import Path

import torch

from ..errors import UserError
from ..models.architectures import build_part
from ..models.lora_keys import guess_family
from ..models.originals import PREFIX, Piece, find_quantized, plan_pieces, read_piece
from ..models.parts import class_names, family_of, read_config, read_index
from ..models.weights import INDEX, WEIGHTS
from ..runtime.programs import say
from ..storage.artifacts import write_json, write_tensors
from ..storage.hashes import digest
from ..storage.reading import read_json
from ..storage.weight_files import WeightFile
from .assembly import assemble

SHARD_BYTES = 4 << 30  # of a file that is written: so much of the transformer is in memory at once
# before names of other parts of a pipeline, and of UNets
OTHERS = ("conditioner.", "cond_stage_model.", "first_stage_model.", "text_encoders.", "vae.")
TOKENIZERS = (
    r"(spiece|tekken)_model$|tokenizer_json$"  # bytes of files, which ComfyUI puts in its own
)
UNET = f"{PREFIX}input_blocks."


def is_transformer(names: list[str]) -> bool:
    """Whether tensors of these names are those of a transformer, with nothing beside it."""
    bare = [name.removeprefix(PREFIX) for name in names]
    has_blocks = any(re.match(r"\w*(blocks|layers)\.\d+\.", name) for name in bare)
    is_other = any(name.startswith((*OTHERS, UNET)) or "lora" in name.lower() for name in names)
    return has_blocks and not is_other


def check_numbers(file: WeightFile) -> None:
    """Raises UserError, by name, where a file's weights are quantized."""
    kinds = {name: kind for name, kind in file.kinds.items() if not re.search(TOKENIZERS, name)}
    if found := find_quantized(kinds):
        name, how = found
        raise UserError(
            f"--model {file.path}: its weights are quantized ({how}: {name:.100}), which losses and "
            f"gradients cannot be computed with; give the same model in bf16, fp16 or fp32"
        )


def check_base(
    path: Path, names: list[str], base: str | None, found: str = "the transformer{} alone"
) -> Path:
    """The folder of a pipeline that lends its other parts. found: what a file holds, with {} for the
    family. Raises UserError where there is none, or it has a UNet."""
    if base is None:
        guess = guess_family(f"diffusion_model.{name.removeprefix(PREFIX)}" for name in names)
        kind = f" of {guess[1]}" if guess else ""
        raise UserError(
            f"--model {path}: {found.format(kind)} ({names[0]:.80}); give the diffusers folder of a model of "
            f"its kind, whose configuration, tokenizers and what the file lacks it takes: --base MODEL"
        )
    folder = Path(base)
    if not folder.is_dir():
        raise UserError(
            f"--base {base}: expected a folder, so that the transformer of {path} can be put beside "
            f"its other parts; download it: hf download {shlex.quote(base)} --local-dir base"
        )
    index = read_index(folder)
    if family_of(folder, index).denoiser != "transformer":
        raise UserError(
            f"--base {base}: {index['_class_name']} has a UNet; {path} holds a transformer "
            f"({names[0]:.80})"
        )
    return folder


def join_transformer(file: WeightFile, base: str | None, place: Path) -> Path:
    """The folder of a pipeline whose transformer is that of a file, made once. base: the pipeline that
    lends the rest. Raises UserError, with the way on, where they do not fit each other."""
    path = file.path
    folder = check_base(path, list(file.shapes), base)
    index = read_index(folder)
    family, part = family_of(folder, index), "transformer"
    item = f"--model {path}"
    denoiser = build_part(class_names(index)[part], read_config(folder / part / "config.json"))
    pieces = plan_pieces(item, file.shapes, denoiser, family)
    status = path.stat()
    key = digest(str(path), status.st_size, status.st_mtime_ns, str(folder))[:8]
    target = place / f"{path.stem}-{key}-{part}" / f"{WEIGHTS[part][0]}.safetensors.index.json"
    if not target.is_file():
        say(f"{path}: a transformer alone; the other parts are those of {folder}")
        write_shards(file, pieces, target)
    return assemble(folder, place, {part: target}, {}, read_json(folder / INDEX, "--base"))


def write_shards(
    file: WeightFile,
    pieces: dict[str, Piece],
    index: Path,
    more: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Writes weights, one shard after the other, and last the index that names them. more: those that
    do not stand in the file."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, piece in pieces.items():
        number = (piece.stop - piece.start) * torch.Size(file.shapes[piece.source][1:]).numel() * 4
        if size and size + number > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += number
    stem, found, total = index.name.removesuffix(".safetensors.index.json"), {}, 0
    for number, names in enumerate(shards, 1):
        shard = f"{stem}-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {name: read_piece(file, pieces[name]) for name in names}
        if number == 1 and more:
            tensors |= more
        index.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(index.with_name(shard), tensors)
        found |= dict.fromkeys(tensors, shard)
        total += sum(tensor.nbytes for tensor in tensors.values())
    write_json(index, {"metadata": {"total_size": total}, "weight_map": found})
