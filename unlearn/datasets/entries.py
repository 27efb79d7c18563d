"""Training images as people have them, with what is known of each."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from ..runtime.printing import printable, shorten
from .captions import PAIRS_SHOWN

NAMES_SHOWN = 3


@dataclass(frozen=True)
class Entry:
    """A training image of a folder."""

    path: Path  # its file
    name: str  # its path below the folder, with /: what people know it by
    captions: list[str]
    group: str | None = None
    repeats: int = 1  # how often an epoch shows it, by kohya's names of folders
    is_class: bool = False  # of prior preservation, see `class_images`


@dataclass(frozen=True)
class Found:
    """What a folder of training images holds, in the order of the names."""

    folder: str  # as it was given
    entries: list[Entry]
    convention: str  # where the captions stood, in words
    skipped: dict[str, list[str]] = field(default_factory=dict)  # why: names
    notes: list[str] = field(default_factory=list)

    def describe(self) -> list[str]:
        """Lines for people: what was found, the first pairs, what was left out and why."""
        counts = sorted({len(entry.captions) for entry in self.entries})
        several = f", {' to '.join(map(str, (counts[0], counts[-1])[: len(counts)]))} captions each"
        lines = [
            f"{self.folder}: {len(self.entries)} pictures{several if counts != [1] else ''}; "
            f"captions from {self.convention}"
        ]
        for entry in self.entries[:PAIRS_SHOWN]:
            more = f" and {len(entry.captions) - 1} more" if entry.captions[1:] else ""
            lines.append(f'{entry.name} -> "{shorten(entry.captions[0])}"{more}')
        for why, names in self.skipped.items():
            shown = ", ".join(shorten(name, 80) for name in names[:NAMES_SHOWN])
            dots = ", ..." if names[NAMES_SHOWN:] else ""
            lines.append(f"{len(names)} left out: {why} ({shown}{dots})")
        return [printable(line) for line in [*lines, *self.notes]]


def group_name(value: object) -> str | None:
    """What a metadata file says in a column, as text; None where it says nothing."""
    if value is None or value == "":
        return None
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
