"""The page of a result, `report.html`: one file that needs nothing else, to be sent on.

A Report holds what the page shows, wherever that comes from; `write_report` draws it. Names, captions
and prompts are anybody's: Jinja2 escapes them all, and the page's own policy forbids every script
but the one in it, and every connection.
"""

import base64
import hashlib
from collections.abc import Iterable
from dataclasses import asdict
from functools import cache
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from ..datasets.boxes import name_box
from ..runtime.printing import printable, shorten
from ..storage.artifacts import write_bytes
from ..version import __version__
from .chosen import MEANS, is_ranking
from .contents import NUM_MARKED, Entry, Report, Row
from .plot import plot_scores
from .standing_out import StandingOut, describe_standing_out, find_standing_out
from .thumbnails import make_thumbnail
from .together import SAME_MEANS, UNUSED_MEANS, Together

NUM_FIRST, NUM_CARDS, NUM_LOWEST = 12, 60, 12  # cards shown at once, and all; negative ones
MOST_NAMED = 3  # images that the first sentence names
MOST_ROWS = 20_000  # in the table of all images: a browser still searches them at once
LONGEST = 400  # characters of a name or caption in that table
LARGE, SMALL, ICON = 512, 256, 160  # pixels: query and first cards; other cards; the index


def breakable(path: str) -> Markup:
    """A path that may be broken after each of its folders, escaped."""
    return Markup("/<wbr>").join(escape(part) for part in printable(path).split("/"))


def format_score(score: float, digits: int = 2) -> str:
    """A score with its sign, as people write numbers."""
    return f"{score:+.{digits}g}".replace("-", "−") if score else "0"


def format_share(share: float) -> str:
    """A share in per cent."""
    return f"{100 * share:.2g} %" if 0 < share < 0.1 else f"{100 * share:.0f} %"


def make_safe(value: object) -> object:
    """What stands for a value in a page, before it is escaped: text is `printable`."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


@cache
def environment() -> Environment:
    """Jinja2 as the pages need it: every value is made printable and escaped."""
    made = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=make_safe,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters.update(breakable=breakable, score=format_score, share=format_share, box=name_box)
    return made


def read_part(name: str) -> tuple[Markup, str]:
    """The page's own style or script, and its hash as a Content-Security-Policy names it."""
    text = (Path(__file__).parent / name).read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return Markup(text), f"'sha256-{digest}'"


def write_page(path: Path, template: str, **values) -> None:
    """Fills a template and writes the page, whole or not at all."""
    style, style_hash = read_part("page.css")
    script, script_hash = read_part("page.js")
    page = environment().get_template(template)
    html = page.render(
        style=style,
        style_hash=style_hash,
        script=script,
        script_hash=script_hash,
        version=__version__,
        **values,
    )
    write_bytes(path, html.encode(errors="backslashreplace"))


def make_cards(rows: Iterable[tuple[int, Row]], num_large: int, highest: float) -> list[dict]:
    """What cards show of rows with their ranks; the first `num_large` have a larger picture."""
    return [
        {
            "rank": rank,
            "row": row,
            "picture": make_thumbnail(row.path, LARGE if number < num_large else SMALL),
            "bar": round(100 * min(1.0, abs(row.score) / highest), 1) if highest else 0,
        }
        for number, (rank, row) in enumerate(rows)
    ]


def list_all(report: Report) -> dict:
    """The rows as the page's script reads them."""
    names = [group.name for group in report.groups]
    groups = {name: number for number, name in enumerate(names)}
    return {
        "groups": [printable(name) for name in names],
        "comparison": report.comparison,
        "rows": [
            [
                shorten(row.name, LONGEST),
                shorten(row.caption, LONGEST),
                float(f"{row.score:.6g}"),
                row.other_rank,
                None if row.group is None else groups.get(row.group),
                int(row.is_exemplar) + 2 * int(row.is_estimate),
            ]
            for row in report.rows[:MOST_ROWS]
        ],
    }


def compare_first(report: Report) -> str | None:
    """How many of the first images another method puts first too, in a sentence; None where that is
    not known, or is no wonder because there are hardly others."""
    if len(report.rows) < 2 * NUM_MARKED:
        return None
    ranks = [row.other_rank for row in report.rows[:NUM_MARKED]]
    if report.comparison is None or not ranks or None in ranks:
        return None
    shared = sum(rank is not None and rank <= len(ranks) for rank in ranks)
    return (
        f"Of the first {len(ranks)}, {shared} are also among the first {len(ranks)} by "
        f"{report.comparison}, which never looks at the model."
    )


def name_first(rows: list[Row], count: int) -> str:
    """Which images stand out, in a sentence; "" where none does."""
    named = ", ".join(
        shorten(row.name) + (f" (“{shorten(row.caption)}”)" if row.caption else "")
        for row in rows[: min(count, MOST_NAMED)]
    )
    more = f" and {count - MOST_NAMED} more" if count > MOST_NAMED else ""
    return f"{'It is' if count == 1 else 'They are'} {named}{more}." if count else ""


def describe_report(report: Report) -> tuple[StandingOut, str, str]:
    """(what stands out, headline, explanation) of a report; the headline says where only a box of
    the picture counts."""
    scores = np.array([row.score for row in report.rows])
    found = report.known or find_standing_out(scores)
    headline, explanation = describe_standing_out(found, len(scores), bool(report.cautions))
    if report.box:
        headline = f"In the {name_box(report.box)}: {headline[0].lower()}{headline[1:]}"
    return found, headline, explanation


def write_report(folder: Path, report: Report) -> Path:
    """Writes FOLDER/report.html and returns its path. Pictures that cannot be read are left out, and
    the page says how many. Raises UserError where it cannot be written."""
    rows = report.rows
    scores = np.array([row.score for row in rows])
    found, headline, explanation = describe_report(report)
    highest = float(np.abs(scores).max()) if len(rows) else 0.0
    ranked = list(enumerate(rows, 1))
    negative = [pair for pair in reversed(ranked) if pair[1].score < 0][:NUM_LOWEST]
    lowest = make_cards(negative, 0, highest)
    first = ranked[: min(NUM_CARDS, len(rows) - len(negative))]
    cards = make_cards(first, NUM_FIRST, highest)
    missing = sum(card["picture"] is None for card in [*cards, *lowest])
    notes = list(report.notes)
    if missing:
        notes.append(
            f"{missing} of {len(cards) + len(lowest)} pictures could not be found or read: give "
            f"--dataroot, the folder that they stand in now"
        )
    path = Path(folder) / "report.html"
    write_page(
        path,
        "page.html",
        report=report,
        query=make_thumbnail(report.picture, LARGE),
        found=found,
        headline=headline,
        explanation=explanation,
        which=name_first(rows, found.count),
        highest_group=max((g.together.score for g in report.groups if g.together), default=0.0),
        compared=compare_first(report),
        plot=plot_scores(scores, NUM_MARKED, found.bound) if len(rows) else None,
        num_marked=min(NUM_MARKED, len(rows)),
        cards=cards,
        num_first=NUM_FIRST,
        chosen=show_chosen(report),
        set_means=MEANS,
        is_ranking=is_ranking([chosen.rank for chosen in report.chosen]),
        lowest=lowest,
        lowest_stand_out=find_standing_out(-scores).count,
        num_negative=int((scores < 0).sum()),
        notes=notes,
        data=list_all(report),
    )
    return path


def show_chosen(report: Report) -> list[dict]:
    """What cards show of the images that are chosen together."""
    chosen = report.chosen[:NUM_CARDS]
    highest = max((each.adds for each in chosen), default=0.0)
    return [
        {
            **asdict(each),
            "row": each.row,
            "picture": make_thumbnail(each.row.path, SMALL),
            "bar": round(100 * max(0.0, each.adds) / highest, 1) if highest > 0 else 0,
        }
        for each in chosen
    ]


def index_entry(link: str, report: Report) -> Entry:
    """What the index page shows of a report."""
    found, headline, _ = describe_report(report)
    return Entry(
        link,
        report.name,
        report.prompt,
        headline,
        report.picture,
        [row.path for row in report.rows[:4]],
        bool(report.cautions) and not found.count,  # else the headline says it
    )


def write_index(folder: Path, entries: list[Entry], together: Together | None = None) -> Path:
    """Writes FOLDER/report.html, the index of several reports, and returns its path. together: what
    these say of the images."""
    path = Path(folder) / "report.html"
    shown = [
        {
            **asdict(entry),
            "picture": make_thumbnail(entry.picture, ICON),
            "first": [make_thumbnail(picture, ICON // 2) for picture in entry.first],
        }
        for entry in entries
    ]
    unused = [show_image(together, row) for row in together.least[:NUM_CARDS]] if together else []
    groups = []
    if together:
        groups = [
            [show_image(together, row) for row in group[:NUM_FIRST]]
            for group in together.groups[:NUM_CARDS]
        ]
    write_page(
        path,
        "index.html",
        entries=shown,
        together=together,
        unused=unused,
        groups=groups,
        unused_means=UNUSED_MEANS,
        same_means=SAME_MEANS,
    )
    return path


def show_image(together: Together, row: int) -> dict:
    """What the index shows of an image."""
    return {
        "name": together.names[row],
        "caption": together.captions[row],
        "picture": make_thumbnail(together.paths[row], ICON),
    }
