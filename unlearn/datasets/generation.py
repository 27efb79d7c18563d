"""How a picture was made, and the values that files from anywhere may say of it."""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from ..runtime.printing import printable, shorten

LONGEST_TEXT = 100_000  # characters of a prompt
LARGEST_INTEGER = 2**64  # no program's seeds are larger


@dataclass(frozen=True)
class Generation:
    """What a picture's file says of how it was made; None where it says nothing."""

    program: str | None = None  # which wrote it
    prompt: str | None = None
    negative_prompt: str | None = None
    seed: int | None = None
    steps: int | None = None
    guidance: float | None = None
    sampler: str | None = None  # with its schedule, where that has a name of its own
    model: str | None = None
    model_hash: str | None = None
    size: tuple[int, int] | None = None  # width, height when it was made; upscaling may follow
    loras: tuple[str, ...] = ()  # names of the LoRA files that changed the model
    notes: list[str] = field(default_factory=list)  # what is not certain, for people

    def describe(self) -> list[str]:
        """Lines for people: what is known, then the notes."""
        size = f"{self.size[0]} x {self.size[1]}" if self.size else None
        model = " ".join(filter(None, [self.model, self.model_hash and f"({self.model_hash})"]))
        said = {
            "made by": self.program,
            "prompt": self.prompt,
            "negative prompt": self.negative_prompt,
            "seed": self.seed,
            "steps": self.steps,
            "guidance": self.guidance,
            "sampler": self.sampler,
            "model": model or None,
            "LoRA": ", ".join(self.loras) or None,
            "size": size,
        }
        lines = [
            f"{what}: {shorten(value, 300)}" for what, value in said.items() if value is not None
        ]
        return [*lines, *map(printable, self.notes)]


def to_text(value: object) -> str | None:
    """A string without NUL and halves of characters, None where a value is none, blank or absurdly
    long."""
    if not isinstance(value, str) or len(value) > LONGEST_TEXT or not value.strip():
        return None
    return value.replace("\0", "").encode(errors="replace").decode().strip()


def to_prompt(value: object) -> str | None:
    """`to_text` of a prompt, of which an empty one is one."""
    return "" if isinstance(value, str) and not value.strip() else to_text(value)


def to_number(value: object) -> float | None:
    """A finite number, or the number that a string is; else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value) if len(str(value)) < 40 else math.nan
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def to_integer(value: object) -> int | None:
    """A whole number that is not negative nor absurdly large, or the one that a string is; else
    None. Seeds have more digits than a float holds."""
    if isinstance(value, str) and value.strip().isascii() and value.strip().isdigit():
        value = int(value) if len(value) < 25 else None
    number = to_number(value)
    if number is None or number != int(number):
        return None
    whole = value if isinstance(value, int) else int(number)
    return whole if 0 <= whole < LARGEST_INTEGER else None


def to_size(width: object, height: object) -> tuple[int, int] | None:
    """Width and height in pixels, None unless both are positive."""
    columns, rows = to_integer(width), to_integer(height)
    return (columns, rows) if columns and rows else None


def to_sampler(*names: object) -> str | None:
    """A sampler's name with that of its schedule, where there is one of its own."""
    found = [text for text in map(to_text, names) if text and text.lower() not in ("automatic",)]
    return " ".join(dict.fromkeys(found)) or None


def to_names(values: Iterable[object]) -> tuple[str, ...]:
    """The strings among some values, each once."""
    return tuple(dict.fromkeys(filter(None, map(to_text, values))))


def parse_object(text: str | None) -> dict | None:
    """The object that a JSON text holds; None where it is another, or none."""
    if not text or not text.lstrip().startswith("{"):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):  # malformed, of a million brackets, of a million digits
        return None
    return value if isinstance(value, dict) else None
