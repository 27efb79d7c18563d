"""A checkpoint file of the original programs made the diffusers folder that every command loads."""

import json
import shlex
import shutil
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from ..datasets.presence import FILES_OF_MODELS
from ..errors import UserError
from ..models.weights import INDEX, WEIGHTS, check_pointer
from ..runtime.programs import say
from ..storage.artifacts import own_part
from ..storage.hashes import digest
from ..storage.weight_files import open_weights
from .assembly import finish_folder
from .customized import drop_parts
from .transformer_files import check_numbers, is_transformer, join_transformer
from .whole_files import is_whole, join_whole

XL = "conditioner.embedders."  # before names of text encoders in checkpoints of Stable Diffusion XL
PIPELINE, XL_PIPELINE = "StableDiffusionPipeline", "StableDiffusionXLPipeline"


def explain_lora(path: Path) -> str:
    """How a LoRA file is given."""
    return (
        "a LoRA file; give the model that it was trained on, and it beside that: "
        f"--model BASE --lora {shlex.quote(str(path))}"
    )


def convert_command(path: Path, pipeline: str) -> str:
    """The command that makes a pipeline's folder of a single file, by diffusers alone."""
    code = (
        f"from diffusers import {pipeline} as P; "
        f"P.from_single_file({str(path)!r}).save_pretrained('converted')"
    )
    return f"python -c {shlex.quote(code)}, then --model converted"


def convert_file(
    path: Path,
    base: str | Path | None,
    find_base: Callable[[Collection[str]], str | None],
    place: Path,
) -> Path:
    """The pipeline's folder that a single checkpoint file is converted to, once. base: the model
    whose configuration and tokenizer it takes, which `find_base` makes a folder, by the names of the
    parts whose weights it need not have. Raises UserError, with the way on, where the file is no such
    checkpoint or cannot be converted."""
    if path.suffix.lower() not in FILES_OF_MODELS:
        raise UserError(
            f"--model {path}: expected a diffusers folder or a checkpoint "
            f"({', '.join(FILES_OF_MODELS)}); quantized and exported models cannot be used"
        )
    check_pointer(path, f"--model {path}")
    with open_weights(path, "--model") as file:
        names = list(file.shapes)
        check_numbers(file)
        if is_transformer(names):
            return join_transformer(file, find_base(("transformer",)), place)
        if is_whole(names):
            return join_whole(file, find_base, place)
    check_keys(path, names)
    status = path.stat()
    key = digest(str(path), status.st_size, status.st_mtime_ns, str(base))
    target = place / f"{path.stem}-{key[:8]}"
    if not (target / INDEX).is_file():
        say(f"{path}: one file; it is made a diffusers folder once, {target}")
        save_converted(path, names, find_base(tuple(WEIGHTS)), target)
    return target


def check_keys(path: Path, names: list[str]) -> None:
    """Raises UserError, with the way on, where the tensors of a file are not those of a whole Stable
    Diffusion checkpoint."""
    if any("lora" in name.lower() for name in names):
        raise UserError(f"--model {path}: {explain_lora(path)}")
    if is_xl(names) and not any(name.startswith(f"{XL}0.transformer.") for name in names):
        raise UserError(
            f"--model {path}: a checkpoint of Stable Diffusion XL's refiner, which only changes "
            f"pictures; give the base model, which makes them"
        )
    if not any(name.startswith("model.diffusion_model.") for name in names):
        first = names[0] if names else "nothing"
        raise UserError(
            f"--model {path}: expected a Stable Diffusion checkpoint (model.diffusion_model. ...), "
            f"found {first:.80}; a part of a diffusers pipeline is given by the pipeline's folder"
        )


def is_xl(names: Iterable[str]) -> bool:
    """Whether tensors of these names are those of a checkpoint of Stable Diffusion XL."""
    return any(name.startswith(XL) for name in names)


def obey_marks(pipeline: Any, path: Path, names: Sequence[str]) -> None:
    """Sets the prediction type and schedule that a checkpoint has by empty tensors (v_pred, ztsnr),
    as its trainers mark it, in place."""
    told = {"prediction_type": "v_prediction"} if "v_pred" in names else {}
    told |= {"rescale_betas_zero_snr": True} if "ztsnr" in names else {}
    if told:
        say(f"{path}: by its marks (v_pred, ztsnr) the scheduler has {json.dumps(told)}")
        pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, **told)


def save_converted(path: Path, names: Sequence[str], config: str | None, target: Path) -> None:
    """Writes a checkpoint file as a pipeline's folder, whole or not at all. names: of its tensors;
    config: the folder of a model of its kind."""
    # Here: it imports image processors, which costs seconds and says so.
    transformers_logging.set_verbosity_error()
    import diffusers

    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    kind = XL_PIPELINE if is_xl(names) else PIPELINE
    left_out = {"feature_extractor": None}
    if kind == PIPELINE:
        left_out |= {"safety_checker": None, "requires_safety_checker": False}
    part = own_part(target)
    shutil.rmtree(part, ignore_errors=True)
    try:
        pipeline = getattr(diffusers, kind).from_single_file(
            str(path), config=config, local_files_only=bool(config), **left_out
        )
        obey_marks(pipeline, path, names)
        pipeline.save_pretrained(part, safe_serialization=True)
    except OSError as error:
        if error.errno:  # a full disk, no permission
            raise
        refuse_conversion(path, config, kind, error)
    except Exception as error:  # what diffusers raises for such files has no common type
        refuse_conversion(path, config, kind, error)
    drop_parts(part)
    finish_folder(part, target)


def refuse_conversion(path: Path, config: str | None, kind: str, error: Exception) -> None:
    """Raises UserError: a file could not be converted here."""
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    way = (
        "give a diffusers folder of its family, whose configuration and tokenizer it takes: "
        "--base MODEL"
        if config is None
        else f"or, with a network: {convert_command(path, kind)}"
    )
    raise UserError(f"--model {path}: cannot be converted ({reason:.160}); {way}") from None
