"""A customized model (custom diffusion) as the folder of a whole pipeline, which every command
loads."""

import json
import shutil
from pathlib import Path

from ..errors import UserError
from ..models.customization import (
    CUSTOMIZED_WEIGHTS,
    add_tokens,
    check_customization,
    read_customization,
)
from ..models.pipelines import load_model, replaced_weights
from ..models.weights import INDEX, LEFT_OUT
from ..runtime.programs import say
from ..storage.artifacts import own_part
from ..storage.hashes import digest, hash_tensors
from ..storage.reading import read_json
from .assembly import finish_folder


def is_customized(folder: Path) -> bool:
    """Whether a folder holds a customized model's weights."""
    return any((folder / name).is_file() for name in CUSTOMIZED_WEIGHTS)


def merge_customization(folder: Path, pipeline: str, unet: str, place: Path) -> Path:
    """The folder of a pipeline with a customized model's K, V and tokens, made once. pipeline, unet:
    its base, as `load_model` takes it. Raises UserError where one does not fit the other."""
    weights, tokens = read_customization(folder)
    key = digest(hash_tensors(weights), hash_tensors(tokens), pipeline, unet)
    target = place / f"{folder.name}-{key[:8]}"
    if (target / INDEX).is_file():
        return target
    words = ", ".join(sorted(tokens)) or "none"
    say(f"{folder}: customizes {pipeline} (new words: {words}); both become one folder, {target}")
    try:
        model = load_model(pipeline, "cpu", unet or None)
    except UserError as error:
        raise UserError(str(error).replace("--sd_version", "--base")) from None
    check_customization(model, folder)
    part = own_part(target)
    shutil.rmtree(part, ignore_errors=True)
    add_tokens(model.pipeline, tokens)
    with replaced_weights(model.denoiser, weights):
        model.pipeline.save_pretrained(part, safe_serialization=True)
    drop_parts(part)
    finish_folder(part, target)
    return target


def drop_parts(folder: Path) -> None:
    """Has a pipeline's index name no part that no loss asks for, and that may not be there."""
    index = read_json(folder / INDEX, "index")
    absent = {part: [None, None] for part in LEFT_OUT if not (folder / part).is_dir()}
    (folder / INDEX).write_text(json.dumps({**index, **absent}))
