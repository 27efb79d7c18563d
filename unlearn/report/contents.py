"""What the page of a result shows, wherever that comes from."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from .standing_out import StandingOut

NUM_MARKED = 10  # highest images: marked in the plot, counted in groups, compared


@dataclass(frozen=True)
class Row:
    """One training image."""

    id: str
    name: str  # what people know it by
    caption: str
    score: float
    is_exemplar: bool = False
    path: Path | None = None  # None, or not there: shown without a picture
    low: float | None = None  # interval of the score, where it is known
    high: float | None = None
    first: int | None = None  # ranks that the interval allows
    last: int | None = None
    is_estimate: bool = False  # of an index, not scored itself
    other_rank: int | None = None  # by the report's `comparison`
    group: str | None = None


@dataclass(frozen=True)
class Chosen:
    """An image of those that are chosen together."""

    row: Row
    rank: int  # of the image alone, from 1
    adds: float  # to the score of all of them, where those before it are gone


@dataclass(frozen=True)
class GroupScore:
    """Of a group that was removed as a whole: its score and an interval, NaN where none is known."""

    score: float
    low: float
    high: float


@dataclass(frozen=True)
class Group:
    """Training images that belong together."""

    name: str
    num_images: int
    share_of_images: float  # 0 to 1
    share: float  # of the sum of all positive scores; 0 to 1
    num_first: int  # among the first NUM_MARKED images
    alone: float = 0.0  # sum of its images' scores, each removed alone
    together: GroupScore | None = None  # removed as a whole; None: not measured


@dataclass(frozen=True)
class Report:
    """What the page of one query shows."""

    name: str  # of the query
    rows: list[Row]  # most influential first
    picture: Path | None = None  # the query's; None: not known
    prompt: str | None = None
    facts: list[tuple[str, str]] = field(default_factory=list)  # of the query: seed, model, ...
    method: str = ""  # sentences: what a score is
    settings: list[tuple[str, str]] = field(default_factory=list)
    cautions: list[str] = field(default_factory=list)  # why the result may mean little
    notes: list[str] = field(default_factory=list)  # what the page lacks, and why
    comparison: str | None = None  # the method whose ranks stand beside the scores
    groups: list[Group] = field(default_factory=list)
    command: str | None = None  # that makes the result again
    known: StandingOut | None = None  # what stands out, where more than the scores' shape tells it
    box: tuple[int, int, int, int] | None = None  # x0, y0, x1, y1: pixels that count; None: all
    remarks: list[str] = field(default_factory=list)  # to know of the images: no doubts
    chosen: list[Chosen] = field(default_factory=list)  # together, in the order of choosing


@dataclass(frozen=True)
class Entry:
    """One query of the index page."""

    link: str  # relative to the index
    name: str
    prompt: str | None
    headline: str
    picture: Path | None
    first: list[Path | None]  # pictures of the highest images
    is_warned: bool  # whether a mark beside the headline says that the result may mean little


def share_groups(rows: list[Row], together: Mapping[str, GroupScore] | None = None) -> list[Group]:
    """The groups of these rows, that with the largest share first, or where groups were removed as a
    whole, that with the highest score; [] where there are fewer than two. together: those scores."""
    known = together or {}
    names = list(dict.fromkeys(row.group for row in rows if row.group is not None))
    total = sum(max(0.0, row.score) for row in rows)
    groups = []
    for name in names if len(names) > 1 else ():
        members = [row for row in rows if row.group == name]
        positive = sum(max(0.0, row.score) for row in members)
        groups.append(
            Group(
                name,
                len(members),
                len(members) / len(rows),
                positive / total if total else 0.0,
                sum(row.group == name for row in rows[:NUM_MARKED]),
                sum(row.score for row in members),
                known.get(name),
            )
        )
    groups.sort(key=lambda group: -group.share)
    return sorted(groups, key=lambda group: -group.together.score if group.together else 0.0)
