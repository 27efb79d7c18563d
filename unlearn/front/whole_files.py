"""The file of all parts of a model with a transformer, as its authors and ComfyUI pass it on, taken apart:
configurations and tokenizers are those of a pipeline's folder, and what the file lacks too."""

import re
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import AutoencoderKL

from ..errors import UserError
from ..models.architectures import build_part
from ..models.families import Family
from ..models.originals import PREFIX, Piece, plan_pieces
from ..models.parts import class_names, family_of, read_config, read_index
from ..models.weights import INDEX, WEIGHTS, find_weights
from ..runtime.programs import say
from ..storage.hashes import digest
from ..storage.reading import read_json
from ..storage.weight_files import WeightFile
from .assembly import assemble
from .transformer_files import TOKENIZERS, check_base, is_transformer, write_shards

ENCODERS = "text_encoders."  # before names of text encoders, as VAES before a VAE's
VAES = ("first_stage_model.", "vae.")
# what no prompt is read with: a tokenizer, what pictures are compared by, numbers of positions
UNREAD = rf"\.(logit_scale|position_ids)$|{TOKENIZERS}"
TWICE = ("encoder.embed_tokens.weight", "lm_head.weight")  # which may stand beside the same
PROJECTION = "text_projection.weight"
Plan = tuple[dict[str, Piece], dict[str, torch.Tensor]]


def is_whole(names: Iterable[str]) -> bool:
    """Whether tensors of these names are those of a transformer and of parts beside it."""
    names = list(names)
    denoiser = [name for name in names if name.startswith(PREFIX)]
    return is_transformer(denoiser) and any(name.startswith((ENCODERS, *VAES)) for name in names)


def join_whole(
    file: WeightFile, find_base: Callable[[Collection[str]], str | None], place: Path
) -> Path:
    """The folder of a pipeline whose weights are those of a file, made once. find_base: the folder that
    lends configurations, tokenizers and the parts that the file lacks, by the names of the parts whose
    weights it need not have. Raises UserError, with the way on, where they do not fit each other."""
    folder, parts, lent = find_parts(file, find_base)
    family = family_of(folder, read_index(folder))
    status = file.path.stat()
    key = digest(str(file.path), status.st_size, status.st_mtime_ns, str(folder))[:8]
    targets = {
        part: place
        / f"{file.path.stem}-{key}-{part}"
        / f"{WEIGHTS[part][0]}.safetensors.index.json"
        for part in parts
    }
    missing = [part for part, target in targets.items() if not target.is_file()]
    # Planned before anything is written.
    plans = {part: plan_part(file, part, parts[part], family, folder) for part in missing}
    if plans:
        say(
            f"{file.path}: is taken apart once; of {folder} are configurations, "
            f"tokenizers{tell(lent)}{tell_rest(file, parts)}"
        )
    for part, (pieces, more) in plans.items():
        write_shards(file, pieces, targets[part], more)
    return assemble(folder, place, targets, {}, read_json(folder / INDEX, "--base"))


def find_parts(
    file: WeightFile, find_base: Callable[[Collection[str]], str | None]
) -> tuple[Path, dict[str, dict[str, str]], list[str]]:
    """(the folder that lends what a file lacks, {part: {name in it: name in the file}}, the parts whose
    weights are lent)."""
    names = [name for name in file.shapes if name.startswith(PREFIX)]
    # Which parts the file has is told by its family's names, which the folder tells.
    base = find_base(tuple(WEIGHTS))
    folder = check_base(file.path, names, base, "a transformer{} and other parts")
    parts = sort_names(file, family_of(folder, read_index(folder)), folder)
    lent = [part for part in WEIGHTS if part not in parts and (folder / part).is_dir()]
    for part in lent:
        find_weights(folder, part, f"--base {folder}")
    return Path(find_base(tuple(parts)) or folder), parts, lent


def tell_rest(file: WeightFile, parts: dict[str, dict[str, str]]) -> str:
    """What is left out of a file, for a message."""
    known = {own for names in parts.values() for own in names.values()}
    rest = [name for name in file.shapes if name not in known and not re.search(UNREAD, name)]
    return f"; left out are {len(rest)} tensors ({rest[0]:.80}, ...)" if rest else ""


def tell(parts: Iterable[str]) -> str:
    """Parts with a comma before each."""
    return "".join(f", {part}" for part in parts)


def sort_names(file: WeightFile, family: Family, folder: Path) -> dict[str, dict[str, str]]:
    """{part of the pipeline: {name in it: name in the file}}. Raises UserError where a part is one that
    this pipeline lacks, or that cannot be read."""
    classes = class_names(read_index(folder))
    encoders = {
        f"{ENCODERS}{own}.": part
        for part, own in family.encoders_in_files.items()
        if part in classes
    }
    starts = {PREFIX: "transformer", **dict.fromkeys(VAES, "vae"), **encoders}
    parts: dict[str, dict[str, str]] = {}
    for name in file.shapes:
        start = next((start for start in starts if name.startswith(start)), None)
        if re.search(UNREAD, name):
            continue
        if start is not None:
            parts.setdefault(starts[start], {})[name.removeprefix(start)] = name
        elif name.startswith(ENCODERS):
            raise UserError(
                f"--model {file.path}: has a text encoder ({name:.100}) that {folder}, of "
                f"{family.name}, has not; give a --base that has it, or the file of the transformer "
                f"alone"
            )
    if "vae" in parts and classes.get("vae") != "AutoencoderKL":
        raise UserError(
            f"--model {file.path}: has a VAE beside the transformer, which is read of files with "
            f"AutoencoderKL alone ({family.name} has {classes.get('vae')}); give the file of the "
            f"transformer alone"
        )
    return parts


def plan_part(
    file: WeightFile, part: str, names: dict[str, str], family: Family, folder: Path
) -> Plan:
    """Where each weight of a part stands in a file, and those that do not stand there as they are.
    names: {name in the part: name in the file}."""
    if part == "vae":
        return {}, read_vae(file, names, folder)
    config = read_config(folder / part / "config.json")
    module = build_part(class_names(read_index(folder))[part], config)
    if part != "transformer":
        return plan_encoder(file, part, names, module, family)
    shapes = {name: file.shapes[name] for name in names.values()}
    return plan_pieces(f"--model {file.path}", shapes, module, family), {}


def plan_encoder(
    file: WeightFile, part: str, names: dict[str, str], module: Any, family: Family
) -> Plan:
    """`plan_part` of a text encoder. Raises UserError where a weight is missing, more or of another
    shape."""
    item, pieces, more, kind = f"--model {file.path}", {}, {}, torch.float32
    left = {name.removeprefix("transformer."): own for name, own in names.items()}
    for name, parameter in module.named_parameters():
        if name == PROJECTION and part in family.unprojected:
            more[name] = torch.eye(*parameter.shape)
            left.pop(name, None)
            continue
        found = next((each for each in spellings(name) if each in left), None)
        if found is None:
            raise UserError(
                f"{item}: lacks {name} of the {part} of this {family.name}: it is of another model; "
                f"give its own: --base MODEL"
            )
        shape = file.shapes[source := left.pop(found)]
        if shape != list(parameter.shape):
            raise UserError(
                f"{item}: {source:.100} has the shape {shape}, that of the {part} of this "
                f"{family.name} {list(parameter.shape)}: it is of another model; give its own: "
                f"--base MODEL"
            )
        pieces[name] = Piece(source, 0, shape[0], False)
        kind = file.rows(source, 0, 1).dtype
    more = {name: value.to(kind) for name, value in more.items()}  # as the others are
    # CLIP without a projection of its own leaves that of its file unread.
    if unknown := [own for name, own in left.items() if name not in (*TWICE, PROJECTION)]:
        raise UserError(
            f"{item}: {unknown[0]:.100} is no weight of the {part} of this {family.name}; give a "
            f"--base of its kind"
        )
    return pieces, more


def spellings(name: str) -> list[str]:
    """The names that a text encoder's weight may have in files."""
    bare = name.removeprefix("model.")
    found = [name, f"text_model.{name}", bare, f"model.{bare}"]
    return [*found, "encoder.embed_tokens.weight"] if name == "shared.weight" else found


def read_vae(file: WeightFile, names: dict[str, str], folder: Path) -> dict[str, torch.Tensor]:
    """A VAE's weights under diffusers' names, which its own loader gives them."""
    tensors = {name: file.rows(own) for name, own in names.items()}
    try:
        vae = AutoencoderKL.from_single_file(
            cast(Any, tensors), config=str(folder), subfolder="vae", local_files_only=True
        )
        found = vae.state_dict()
        if missing := [name for name, value in found.items() if value.is_meta]:
            raise ValueError(f"it lacks {missing[0]}")
    except Exception as error:  # what diffusers raises for such tensors has no common type
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"--model {file.path}: its VAE is not that of {folder} ({reason:.160}); give a --base of its kind"
        ) from None
    return {name: value.contiguous().clone() for name, value in found.items()}
