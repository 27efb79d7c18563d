"""What is answered: the ranking of a picture's training images, with how far each stands out and
what plain similarity says."""

import shutil
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from ..datasets.boxes import name_box
from ..datasets.tasks import Task, find_result
from ..evaluation.stored_results import OF_BOUND, read_report
from ..report.chosen import describe_set
from ..report.contents import Report
from ..report.page import describe_report, write_report
from ..report.ranking import Ranking, print_table
from ..report.standing_out import FEWEST, WEAK, StandingOut, find_standing_out
from ..report.together import Together
from ..runtime.printing import show
from ..storage.hashes import hash_file
from ..storage.reading import read_npz
from .questions import Question

FILES = ("influence.csv", "visualization.jpg", "report.html")
NAMED = 3  # images that the last sentence names
LEGEND = "stands out: how far above the median the score is; beyond 1 is where {} rarely comes"
BY_CHANCE, UNSEEN = "chance alone", "an image that the model never saw"


@dataclass
class Attribution:
    """What `attribute` found of one picture."""

    question: Question
    ranking: Ranking = field(repr=False)
    report: Report = field(repr=False)
    folder: Path  # of influence.npz, .csv, the picture and report.html
    content: str = field(default="", repr=False)  # hash of the influence.npz that it was read from
    unit: float = 1.0  # the score from which an image stands out, by removal
    index: Path | None = None  # the page of all pictures of one call, where there are several
    together: Together | None = field(default=None, repr=False)  # what these say of the images

    @property
    def scores(self) -> np.ndarray:
        """Scores of the training images [n] float64, in the order of `ranking.ids`."""
        return self.ranking.scores

    @property
    def warnings(self) -> list[str]:
        """Why the scores may mean little."""
        return self.ranking.warnings

    @property
    def notes(self) -> list[str]:
        """What to know of the images, such as which were left out."""
        return self.report.remarks

    @cached_property
    def standing_out(self) -> StandingOut:
        """Which scores are not like the others."""
        return self.report.known or find_standing_out(self.scores)

    @property
    def summary(self) -> str:
        """Which images stand out, how clearly, or that none does, in plain words."""
        found = self.standing_out
        _, headline, _ = describe_report(self.report)
        if not found.count:
            return headline if found.is_tied else f"{headline} {WEAK}"
        names = [row.name for row in self.report.rows[: min(found.count, NAMED)]]
        more = f" and {found.count - NAMED} more" if found.count > NAMED else ""
        listed = f"{', '.join(names)}{more}."
        if self.warnings:
            return f"{headline} By the scores alone: {listed}"
        return f"{headline.removesuffix('.')}: {listed}"

    def table(self, count: int | None = None) -> list[dict]:
        """The first `count` images, or all, most influential first: rank, image (its name), caption,
        score, stands_out (1: where chance alone rarely comes; None: it cannot be told),
        similarity_rank, path."""
        found, median = self.standing_out, float(np.median(self.scores))
        return [
            {
                "rank": rank,
                "image": row.name,
                "caption": row.caption,
                "score": row.score,
                "stands_out": None
                if found.bound is None
                else (row.score - median) / (found.bound - median),
                "similarity_rank": row.other_rank,
                "path": row.path,
            }
            for rank, row in enumerate(self.report.rows[:count], 1)
        ]

    @property
    def chosen_set(self) -> list[dict]:
        """The images that would be missed most together, in the order in which they were chosen: place,
        image (its name), caption, adds (to their score, where those before it are gone), rank (alone),
        path. [] by other ways of scoring than removal."""
        return [
            {
                "place": place,
                "image": chosen.row.name,
                "caption": chosen.row.caption,
                "adds": chosen.adds,
                "rank": chosen.rank,
                "path": chosen.row.path,
            }
            for place, chosen in enumerate(self.report.chosen, 1)
        ]

    def write_table(self) -> None:
        """Writes influence.csv with a column for every number of the table."""
        table = self.table()
        columns = {
            "stands_out": [
                "" if row["stands_out"] is None else f"{row['stands_out']:.6g}" for row in table
            ],
            "similarity_rank": [
                "" if row["similarity_rank"] is None else row["similarity_rank"] for row in table
            ],
        }
        if all(row.low is not None for row in self.report.rows):
            rows = self.report.rows
            columns["low"] = [f"{row.low:.6g}" for row in rows]
            columns["high"] = [f"{row.high:.6g}" for row in rows]
            columns["rank_first"] = [row.first for row in rows]
            columns["rank_last"] = [row.last for row in rows]
        if self.report.chosen:
            places = {chosen.row.id: place for place, chosen in enumerate(self.report.chosen, 1)}
            columns["set_place"] = [places.get(row.id, "") for row in self.report.rows]
        self.ranking.to_csv(self.folder / "influence.csv", columns)

    def show(self, count: int = 10) -> None:
        """Prints the first images, what there is to warn of, the files and the summary."""
        rows = [
            [
                row["rank"],
                f"{row['score']:+.3e}",
                "" if row["stands_out"] is None else f"{row['stands_out']:.2f}",
                "" if row["similarity_rank"] is None else row["similarity_rank"],
                row["image"],
                row["caption"],
            ]
            for row in self.table(count)
        ]
        box = f", in the {name_box(self.report.box)}" if self.report.box else ""
        title = f'{self.question.picture.name}{box}: "{self.question.prompt}"'
        print_table(
            title, ["rank", "score", "stands out", "by similarity", "image", "caption"], rows
        )
        if self.standing_out.bound is not None:
            show(f"({LEGEND.format(UNSEEN if self.standing_out.is_calibrated else BY_CHANCE)})")
        elif len(self.scores) < FEWEST:
            show(f"(stands out: needs at least {FEWEST} images)")
        chosen = self.chosen_set
        names, ranks = [each["image"] for each in chosen], [each["rank"] for each in chosen]
        if told := describe_set(names, ranks, count):
            show("", told)
        if self.warnings:
            show("", *(f"Warning: {warning}." for warning in self.warnings))
        if self.notes:
            show("", *(f"Note: {note.removesuffix('.')}." for note in self.notes))
        show("", *(f"{self.folder / name}" for name in FILES))
        show("", self.summary)

    def save(self, folder: str | Path) -> Path:
        """Copies the page, the table and the picture into another folder. Returns it."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            shutil.copyfile(self.folder / name, target / name)
        return target


def read_attribution(
    question: Question, task: Task, root: Path, results: Path, remarks: list[str]
) -> Attribution:
    """What stands of one picture in the folder of results; its page and its table are written. No
    other process may write it anew meanwhile (`sharing.turn`). remarks: of the images, for the
    page's top."""
    folder = find_result(results / "influence", task)
    path = folder / "influence.npz"
    name = folder.relative_to(results / "influence").as_posix()
    report = replace(read_report(results, name, str(root), task), remarks=remarks)
    write_report(folder, report)
    rows = sorted(report.rows, key=lambda row: row.id)
    ranks = {row.id: rank for rank, row in enumerate(report.rows)}
    ranking = Ranking(
        [row.id for row in rows],
        [row.caption for row in rows],
        [row.path for row in rows],
        np.array([row.score for row in rows]),
        np.argsort([ranks[row.id] for row in rows]),
        np.array([row.is_exemplar for row in rows]),
        list(report.cautions),
    )
    bound = read_npz(path, OF_BOUND, "ask again").get("bound", 1.0)
    answer = Attribution(question, ranking, report, folder, hash_file(path), float(bound))
    answer.write_table()
    return answer
