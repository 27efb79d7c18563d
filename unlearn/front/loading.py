"""The model of a run, found and loaded as its pictures' questions need it."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ..errors import UserError
from ..models.architectures import architecture_of, read_architecture
from ..models.customization import check_texts, check_words
from ..models.embeddings import Embedding
from ..models.lora import has_matrices
from ..models.lora_files import LoraFile
from ..models.pipelines import Model, load_model
from ..models.precision import WEIGHTS
from ..runtime.programs import choose_device, say
from .embeddings import merge_embeddings
from .jobs import DATASET
from .models import Source, find_model
from .needs import describe_bytes, find_needs, fits
from .questions import (
    Question,
)


def describe_root(source: Source, side: int) -> dict:
    """The settings of a data root of a model; side: pixels of a picture's, 0 for the model's own."""
    settings = {"name": DATASET, "pipeline": source.pipeline}
    settings |= {"unet": source.unet} if source.unet else {}
    settings |= {"lora": list(source.lora)} if source.lora else {}
    settings |= {"weights": source.weights} if source.weights not in ("", "fp32") else {}
    return settings | ({"resolution": side} if side else {})


def load_source(
    model: str | Path,
    base: str | Path | None,
    place: Path,
    device: str | None,
    loras: Sequence[LoraFile] = (),
    embeddings: Sequence[Embedding] = (),
    weights: str | None = None,
) -> tuple[Source, Model]:
    """A model found, given new words, and loaded. Raises UserError, naming --model, where that cannot
    be done."""
    lora = tuple(str(each.named) for each in loras)
    source = replace(find_model(model, base, place), lora=lora)
    if embeddings:
        merged = merge_embeddings(list(embeddings), source.pipeline, source.unet, place)
        source = replace(source, pipeline=str(merged), unet="")
    place_of_passes = choose_device(device)
    chosen = weights or source.weights or choose_weights(source, place_of_passes)
    source = replace(source, weights=chosen)
    try:
        loaded = load_model(
            source.pipeline, place_of_passes, source.unet or None, lora=lora, weights=chosen
        )
    except UserError as error:
        raise UserError(str(error).replace("--sd_version", "--model")) from None
    return source, loaded


def choose_weights(source: Source, device: torch.device) -> str:
    """The precision of a model's weights where nobody says: bf16 where float32 does not fit on a GPU
    and bf16 does, which is said; else fp32."""
    if device.type != "cuda" or not Path(source.pipeline).is_dir():
        return "fp32"
    architecture = read_architecture(source.pipeline, source.unet)
    size = torch.cuda.mem_get_info(device)[1] / 1e9
    lora = bool(source.lora)
    needed = {
        weights: find_needs(architecture, source.side, lora=lora, weights=weights).least_bytes
        for weights in WEIGHTS
    }
    if fits(needed["fp32"], size) or not fits(needed["bf16"], size):
        return "fp32"
    say(
        f"weights in bfloat16: in float32 {describe_bytes(needed['fp32'])} would be needed on the "
        f"device, which has {size:.0f} GB; --weights fp32 tries that"
    )
    return "bf16"


def tell_needs(model: Model, side: int, scoring: str) -> str:
    """What a run of a model takes, in words. side: pixels of a picture's, 0 for the model's own."""
    lora = has_matrices(model.denoiser)
    return find_needs(architecture_of(model), side, scoring, lora, model.weights).describe()


def check_prompts(model: Model, questions: list[Question]) -> None:
    """Raises UserError where a prompt has a new word that the model does not know."""
    prompts = {str(question.picture): question.prompt for question in questions}
    try:
        check_words(None, {}, model.word_reader, prompts)
    except UserError as error:
        problem, _, tail = str(error).partition("; give the task")
        way = "; give the model that was customized with it: --model FOLDER --base MODEL"
        raise UserError(problem + way if tail else str(error)) from None
    check_texts(model.reader[0], model.word_reader, prompts)
