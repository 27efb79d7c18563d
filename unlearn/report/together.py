"""What several pictures say together of the training images: which none of them uses, and which do
the same."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..runtime.printing import shorten, show
from .ranking import defuse, write_csv

NAMED = 5  # images that a sentence names
UNUSED_MEANS = (
    "In each picture their score is below the average of all images and pictures. Where it was "
    "measured, training without the lowest quarter of the images cost the pictures as much as "
    "training without a random quarter, and a quarter of what training without the highest one "
    "cost. So they matter little, but not nothing. Whether an image spoils the pictures no score "
    "tells: none that was tried predicts it."
)
SAME_MEANS = (
    "What one of a group teaches the model, the others teach too. So the score of each is low, and "
    "training without one of them changes little, however much they made a picture together."
)
FEWEST = 10  # images, below which an average says little


@dataclass(frozen=True)
class Together:
    """Of n training images and some pictures."""

    names: list[str]
    captions: list[str]
    paths: list[Path | None]
    pictures: list[str]
    scores: np.ndarray  # [pictures, n], 1 where an image stands out
    unused: np.ndarray  # [n] bool
    groups: list[list[int]]  # images that do the same
    group_scores: np.ndarray  # [pictures, groups]: of all of a group together; NaN: not known
    is_doubtful: bool  # whether the result of a picture may mean little

    @property
    def highest(self) -> np.ndarray:
        """Each image's highest score in any picture, [n]."""
        return self.scores.max(axis=0)

    @property
    def least(self) -> list[int]:
        """The unused images, the lowest first."""
        order = np.argsort(self.highest, kind="stable")
        return [int(row) for row in order if self.unused[row]]

    def describe_unused(self) -> str:
        """How many images no picture uses, in a sentence."""
        count, total = len(self.least), len(self.names)
        which = "picture" if len(self.pictures) == 1 else f"{len(self.pictures)} pictures"
        if not count:
            return f"Each of the {total:,} images is used by one of the {which}."
        are = "is" if count == 1 else "are"
        return f"{count:,} of {total:,} images {are} used by none of the {which}."

    def name(self, rows: Sequence[int], most: int = NAMED) -> str:
        """Images by their names, the first few of many."""
        more = f" and {len(rows) - most} more" if len(rows) > most else ""
        return ", ".join(shorten(self.names[row]) for row in rows[:most]) + more

    def describe_group(self, number: int) -> str:
        """How much a group does together and each image of it, in a sentence."""
        scores = self.group_scores[:, number]
        if not np.isfinite(scores).all():
            return f"{len(self.groups[number])} images."
        each = self.highest[self.groups[number]].max()
        return (
            f"{len(self.groups[number])} images; together at most {scores.max():.2g} "
            f"({shorten(self.pictures[int(scores.argmax())], 60)}), each alone at most {each:.2g}; "
            f"beyond 1 an image stands out."
        )

    def write_table(self, path: Path) -> Path:
        """Writes all images, the most used first. Returns the path."""
        group_of = {row: number for number, rows in enumerate(self.groups, 1) for row in rows}
        used = self.scores >= self.scores.mean()
        header = ["image", "caption", "highest", "picture", "used_by", "unused", "same_group"]
        rows = [
            [
                self.names[row],
                self.captions[row],
                f"{self.highest[row]:.6g}",
                self.pictures[int(self.scores[:, row].argmax())],
                int(used[:, row].sum()),
                "yes" if self.unused[row] else "",
                group_of.get(row, ""),
            ]
            for row in np.argsort(-self.highest, kind="stable").tolist()
        ]
        write_csv(path, header, [[defuse(cell) for cell in row] for row in rows], b"\xef\xbb\xbf")
        return path

    def show(self) -> None:
        """Prints which images no picture uses, and which do the same."""
        show("", self.describe_unused())
        if self.least:
            show(f"  {self.name(self.least)}", f"({UNUSED_MEANS})")
        if self.groups:
            show("", "These do the same:")
            for number, rows in enumerate(self.groups):
                show(f"  {self.name(rows, 10)}: {self.describe_group(number)}")
            show(f"({SAME_MEANS})")
        if self.is_doubtful:
            show("", "The result of a picture may mean little, and so may this.")


def describe_same(names: Sequence[Sequence[str]]) -> list[str]:
    """A remark for each picture's page where images do the same; names: of each group."""
    if not names:
        return []
    listed = "; ".join(
        ", ".join(shorten(name, 80) for name in group[:NAMED])
        + (f" and {len(group) - NAMED} more" if len(group) > NAMED else "")
        for group in names[:NAMED]
    )
    more = f"; and {len(names) - NAMED} more groups" if len(names) > NAMED else ""
    return [f"These images do the same: {listed}{more}. {SAME_MEANS}"]
