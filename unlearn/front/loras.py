"""LoRA files that change a model: what their headers fill in, and where the folder of training images
is another than they tell of."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from ..datasets.entries import Found
from ..models.lora_files import LoraFile, read_lora
from ..models.lora_headers import compare_header, parse_header
from ..models.lora_names import parse_name
from ..models.pipelines import Model
from ..runtime.printing import shorten
from ..runtime.programs import say


def open_loras(names: Iterable[str | Path]) -> list[LoraFile]:
    """The LoRAs of FILE_OR_FOLDER[:WEIGHT], under absolute paths. Raises UserError where one cannot
    be used."""
    named = [parse_name(str(name)) for name in names]
    return [read_lora(replace(each, path=Path(os.path.abspath(each.path)))) for each in named]


def fill_caption(loras: Sequence[LoraFile]) -> str | None:
    """The caption of all images by the header of the first LoRA, for those that have none here;
    None where it does not say one."""
    triggers = [parse_header(each.header).trigger for each in loras[:1]]
    if not triggers or triggers[0] is None:
        return None
    say(f'{loras[0].named.path}: by its header all images had the caption "{shorten(triggers[0])}"')
    return triggers[0]


def choose_side(model: Model, loras: Sequence[LoraFile]) -> int:
    """Pixels of a side by the header of the first LoRA, 0 where it does not say them or they are the
    model's own."""
    sides = [parse_header(each.header).side for each in loras[:1]]
    if not sides or sides[0] is None or sides[0] == model.own_resolution:
        return 0
    say(f"{loras[0].named.path}: by its header it was trained at {sides[0]} x {sides[0]} pixels")
    return sides[0]


def compare_loras(loras: Sequence[LoraFile], found: Found, side: int, model: Model) -> list[str]:
    """What the header of the first LoRA says otherwise than the folder or the model; said here too."""
    entries = [entry for entry in found.entries if not entry.is_class]  # the header's own list
    captions, repeats = zip(*((entry.captions, entry.repeats) for entry in entries))
    notes = [
        note
        for each in loras[:1]
        for note in compare_header(
            parse_header(each.header), captions, side or None, repeats, model
        )
    ]
    for note in notes:
        say(f"{loras[0].named.path}: {note}")
    return notes
