"""A ranking: what a query's candidates are worth, most influential first."""

import codecs
import csv
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from ..attribution.influence import best_view, rank_images
from ..attribution.intervals import Intervals, find_intervals
from ..datasets.boxes import Box
from ..datasets.pictures import load_image
from ..datasets.training_sets import TrainingSet
from ..errors import UserError
from ..runtime.printing import printable, show
from ..runtime.programs import log
from ..storage.artifacts import whole_file
from .figures import TILE, draw_influence

HEADER = ["rank", "id", "image", "caption", "score", "exemplar", "path"]


@dataclass(repr=False)
class Ranking:
    """Candidates, exemplars first where there are any, and their scores."""

    ids: list[str]
    captions: list[str]
    paths: list[Path | None]  # None where there is no picture
    scores: np.ndarray  # [n], higher is more influential
    order: np.ndarray  # [n] int64: indices by falling score
    is_exemplar: np.ndarray  # [n] bool
    warnings: list[str] = field(default_factory=list)  # why it may mean nothing
    intervals: Intervals | None = None  # how sure the scores are, where that is known

    @classmethod
    def of_scores(
        cls,
        image_sets: dict[str, TrainingSet],
        scores: np.ndarray,
        warnings: Iterable[str] = (),
        intervals: Intervals | None = None,
    ) -> "Ranking":
        """The ranking of the images of some sets, `exemplar` first, by scores [n]."""
        sets = list(image_sets.values())
        return cls(
            ids=[id for images in sets for id in images.ids],
            captions=[caption for images in sets for caption in images.captions],
            paths=[path for images in sets for path in images.paths],
            scores=scores,
            order=rank_images(scores),
            is_exemplar=np.arange(len(scores)) < len(image_sets.get("exemplar", ())),
            warnings=list(warnings),
            intervals=intervals,
        )

    def __repr__(self) -> str:
        """What it is of, not its arrays: `show` shows them."""
        first = f", first {self.names[self.order[0]]}" if self.ids else ""
        return f"Ranking of {len(self)} images{first}"

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, count: int | None = None) -> list[list]:
        """The first `count` candidates, or all: rank, id, caption, score, exemplar or not, path."""
        return [
            [
                rank + 1,
                self.ids[index],
                self.captions[index],
                float(self.scores[index]),
                bool(self.is_exemplar[index]),
                self.paths[index],
            ]
            for rank, index in enumerate(self.order[:count])
        ]

    @cached_property
    def names(self) -> list[str]:
        """What people call the candidates: `name_images`."""
        return name_images(self.ids, self.paths, self.is_exemplar)

    def show(self, count: int = 10, title: str = "") -> None:
        """Prints the first `count` candidates, and what there is to warn of."""
        has_exemplars = bool(self.is_exemplar.any())
        header = ["rank", "score", *["exemplar"] * has_exemplars, "image", "caption"]
        rows = []
        for rank, index in enumerate(self.order[:count]):
            exemplar = ["yes" if self.is_exemplar[index] else ""] * has_exemplars
            score = f"{self.scores[index]:+.3e}"
            rows.append([rank + 1, score, *exemplar, self.names[index], self.captions[index]])
        print_table(title, header, rows)
        if self.warnings:
            show("", *(f"Warning: {warning}." for warning in self.warnings))

    def to_csv(
        self,
        path: str | Path = "influence.csv",
        columns: Mapping[str, Sequence[object]] | None = None,
    ) -> Path:
        """Writes all candidates, as spreadsheets read them. What there is to warn of stands in every
        row, so that a part of the table keeps it. columns: more of them by name, their cells most
        influential first. Returns the path."""
        warning = ["; ".join(self.warnings)] if self.warnings else []
        known = self.intervals.arrays() if self.intervals else {}
        sure = {
            name: [f"{value:.6g}" for value in values[self.order]] for name, values in known.items()
        }
        columns = {**sure, **(columns or {})}
        more = list(zip(*columns.values())) if columns else [()] * len(self)
        rows = [
            [
                rank,
                id,
                self.names[index],
                caption,
                f"{score:.6g}",
                exemplar,
                image,
                *cells,
                *warning,
            ]
            for index, (rank, id, caption, score, exemplar, image), cells in zip(
                self.order, self.rows(), more
            )
        ]
        header = [*HEADER, *columns, *["warning"] * bool(warning)]
        write_csv(path, header, [[defuse(cell) for cell in row] for row in rows], codecs.BOM_UTF8)
        return Path(path)

    def picture(
        self,
        query: TrainingSet | None = None,
        count: int = 10,
        path: str | Path | None = None,
        box: Box | None = None,
    ) -> Image.Image:
        """The query, where one is given, beside the first `count` candidates; written to `path`
        (JPEG) too, where one is given. box: of the query's pixels, where only these count."""
        pictures = [
            (load_picture(path), f"{rank}. {caption} ({score:+.2g})", exemplar)
            for rank, _, caption, score, exemplar, path in self.rows(count)
        ]
        image = load_image(query.paths[0]) if query and query.paths[0] else None
        prompt = query.captions[0] if query else ""
        drawn = draw_influence(image, prompt, pictures, self.warnings, box=box)
        if path:
            jpeg = io.BytesIO()  # Pillow's own writing to a file does not say that the disk is full
            drawn.save(jpeg, "JPEG", quality=92)
            with whole_file(path) as file:
                file.write(jpeg.getvalue())
        return drawn


def rank(
    images: TrainingSet | dict[str, TrainingSet],
    changes: "np.ndarray | dict[str, np.ndarray]",
    warnings: Iterable[str] = (),
) -> Ranking:
    """Ranks candidates by how much their losses rose. Source: [AbU] Eq. 6.

    images: a TrainingSet, or several by name, of which `exemplar` comes first; changes: of the
    losses, float [2n], n images as is and then mirrored, or {name: [2n]}: the larger view counts;
    or scores of the images, [n], or of each draw, [draws, n], whose sums are then ranked, with
    intervals. Raises UserError where one is NaN or infinite.
    """
    sets = images if isinstance(images, dict) else {"laion": images}
    if not isinstance(changes, dict) and np.ndim(changes) == 2:
        draws = np.asarray(changes, np.float64)
        ranking = rank(images, draws.sum(axis=0), warnings)
        return replace(ranking, intervals=find_intervals(draws))
    by_name = changes if isinstance(changes, dict) else {"laion": changes}
    for name, values in sets.items():
        if np.shape(by_name[name]) not in ((2 * len(values),), (len(values),)):
            raise UserError(
                f"changes: expected {2 * len(values)} numbers, two views of each of "
                f"{len(values)} images, or {len(values)} scores, found the shape "
                f"{list(np.shape(by_name[name]))}"
            )
    given = {name: np.asarray(by_name[name]) for name in sets}
    scores = np.concatenate(
        [
            best_view(given[name]) if len(given[name]) > len(values) else given[name]
            for name, values in sets.items()
        ]
    )
    if not np.isfinite(scores).all():
        raise UserError(
            "a score is NaN or infinite; the weights have diverged (try a smaller --unlearn_lr or "
            "a larger --damping)"
        )
    return Ranking.of_scores(sets, scores, warnings)


def name_images(ids: Sequence[str], paths: Sequence, is_exemplar: np.ndarray) -> list[str]:
    """What people know the images by: paths below the folder that all have in common; ids of
    exemplars, and where there are no paths."""
    known = [
        "" if mask or not path else os.path.abspath(path) for path, mask in zip(paths, is_exemplar)
    ]
    folders = {os.path.dirname(path) for path in known if path}
    parent = os.path.join(os.path.commonpath(folders), "") if folders else ""
    return [path.removeprefix(parent) or id for id, path in zip(ids, known)]


def load_picture(path: str | Path | None) -> Image.Image | None:
    """A candidate's picture, or None, with a warning, where it cannot be read: that must not cost
    the result."""
    try:
        image = load_image(path) if path else None
        if image and max(image.size) > 4 * TILE:
            image.thumbnail((4 * TILE, 4 * TILE))  # a thousand pictures may be asked for
        return image
    except UserError as error:
        log.warning(f"left out of the picture: {error}")
        return None


def defuse(cell: object) -> object:
    """A cell that no spreadsheet takes for a formula: text that begins like one gets an apostrophe,
    which spreadsheets do not show."""
    is_formula = isinstance(cell, str) and cell[:1] in ("=", "+", "-", "@") and not is_number(cell)
    return f"'{cell}" if is_formula else cell


def restore(text: str) -> str:
    """The text of a cell that was `defuse`d."""
    return text[1:] if text[:1] == "'" and defuse(text[1:]) == text else text


def is_number(text: str) -> bool:
    """Whether a text is a number."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def write_csv(
    path: str | Path, header: Sequence[object], rows: Iterable[Sequence[object]], mark: bytes = b""
) -> None:
    """Writes a CSV file; text in it is `printable`, so that a row is a line. mark: the bytes that it
    begins with."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows(
        [
            [printable(cell) if isinstance(cell, (str, Path)) else cell for cell in row]
            for row in [header, *rows]
        ]
    )
    with whole_file(path) as file:
        file.write(mark + text.getvalue().encode())


def print_table(title: str, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Prints rows under a header, columns aligned."""
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    show("", title)
    for row in [header, ["-" * width for width in widths], *rows]:
        show("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
