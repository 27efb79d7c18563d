"""What a query ends in: influence.npz, .csv, .pkl and the picture in its folder, and a table on
screen."""

import pickle
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from ..attribution.influence import find_warnings
from ..attribution.studies import Study
from ..datasets.boxes import Box, name_box
from ..datasets.settings import AUTO
from ..datasets.training_sets import TrainingSet
from ..errors import UserError
from ..runtime.printing import printable, show
from ..storage.artifacts import whole_file
from ..storage.records import record_path, write_record
from .chosen import describe_set
from .ranking import Ranking, rank

STRANGE = 1.75  # times the highest loss of the training images
REMOVAL_MEANING = (
    "how much less certain the model's prediction of the query would be without the image"
)
OF_QUERY = ("query_loss_before", "query_loss_after", "relative_weight_change")


def describe_recall(recall: float, recall_low: float, recall_k: int, num_audited: int) -> str:
    """What an audit says of a shortlist, in a sentence."""
    if np.isnan(recall):
        return (
            f"An audit of {num_audited} others does not tell how many of the best "
            f"{recall_k} the shortlist misses: give --audit 100."
        )
    bound = (
        "an audit so small gives no lower bound: give --audit 100"
        if np.isnan(recall_low)
        else f"and hardly less than {recall_low:.0%}"
    )
    return (
        f"Of the best {recall_k} training images the shortlist holds about {recall:.0%}, {bound} "
        f"(from {num_audited} others, drawn at random; images unlike all of these may be missed "
        f"besides)."
    )


def median_change(changes: np.ndarray) -> float:
    """Median over the images of the mean of their views' loss changes, [2n]: the larger view, which
    ranks an image, would be well above 0 from the noise of the two alone."""
    return float(np.median(changes.reshape(2, -1).mean(axis=0)))


def find_strange(own: float, before: dict[str, np.ndarray]) -> list[str]:
    """A warning where the model explains the query far worse than any training image. own: the
    query's loss before unlearning; before: the images' by image set, each the mean over the same
    grid. STRANGE lies between what data/emoji_small shows: of 60 pictures that its model made 3 had
    a higher loss than every training image, the highest 1.5 times theirs; noise, a black square, a
    photograph of emoji and another model's picture had 2.0 to 3.1 times. Of removal's one timestep,
    the highest of 160 own pictures of data/emoji_small and data/emoji_shared had 1.74 times; noise
    2.6 to 4.3, a black square 1.9 and 2.8, pictures of other models 0.9 to 4.5, 45 of 48 of them
    above the bound."""
    highest = max((float(losses.max()) for losses in before.values()), default=np.inf)
    if not own > STRANGE * highest:
        return []
    return [
        f"the model explains this picture far worse than any training image (loss {own:.4g}, theirs "
        f"at most {highest:.4g}): another model may have made it, or from another prompt"
    ]


def rank_query(
    study: Study, changes: dict, shown: dict, own: float, folder: Path, cautions: Iterable[str] = ()
) -> Ranking:
    """The ranking of a query, with `cautions` and what there is to warn of its step and its Fisher.
    own: the loss of the whole query before unlearning. Raises UserError where a number is not finite."""
    if not np.isfinite([shown[name] for name in OF_QUERY]).all():
        raise UserError(
            f"{folder}: a loss of the query itself is NaN or infinite; the weights have diverged "
            f"(try a smaller --unlearn_lr or a larger --damping)"
        )
    warnings = find_warnings(
        shown["relative_weight_change"], shown["query_loss_before"], shown["query_loss_after"]
    )
    warnings += find_strange(own, study.before)
    try:
        return rank(study.image_sets, changes, [*cautions, *warnings, *study.fisher.warnings])
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None


def save(
    folder: Path,
    query: TrainingSet,
    ranking: Ranking,
    shown: dict,
    identity: dict,
    found: dict,
    top_k: int,
    box: Box | None,
) -> None:
    """Writes a query's ranking: influence.npz with its record, .csv, .pkl and visualization.jpg.
    What there is to warn of stands in all of them. shown: what stands in influence.npz beside the
    scores; found: what its record tells besides; box: what of its picture counts."""
    path = folder / "influence.npz"
    record_path(path).unlink(missing_ok=True)
    ranking.to_csv(folder / "influence.csv")
    with whole_file(folder / "influence.pkl") as file:
        # For those who read the published program's; never read here.
        pickle.dump({"influence": ranking.scores, "rank": ranking.order}, file)
    ranking.picture(query, top_k, folder / "visualization.jpg", box)
    with whole_file(path) as file:
        np.savez(
            file,
            ids=np.array(ranking.ids),
            influence=ranking.scores,
            rank=ranking.order,
            is_exemplar=ranking.is_exemplar,
            warnings=np.array(ranking.warnings, str),
            **(ranking.intervals.arrays() if ranking.intervals else {}),
            **shown,
        )
    steps = {name: shown[name] for name in ("alpha", "alpha_over_N") if name in shown}
    write_record(path, identity, found={**steps, "warnings": ranking.warnings, **found})


def name_place(box: Box | None) -> str:
    """What of a query's picture counts, as it follows its name; "" where all does."""
    return f" in the {name_box(box)}" if box else ""


def print_result(
    folder: Path,
    study: Study,
    query: TrainingSet,
    ranking: Ranking,
    shown: dict,
    top_k: int,
    remedy: str,
) -> None:
    """Prints a query's table and what is known of it. remedy: the command that lets the step be
    chosen, for where it was given and is too small or too large."""
    settings = study.unlearning
    is_chosen = settings.unlearn_lr == AUTO
    place = name_place(settings.box)
    ranking.show(top_k, f'{query.ids[0]}{place and f",{place}"}: "{query.captions[0]}"')
    median = (
        f", the median training image's by {shown['median_change']:+.1e}"
        if "median_change" in shown
        else ""
    )
    print(
        f"\n{settings.weight_selection} moved by {shown['relative_weight_change']:.2%}. The "
        f"query's own loss{place} went from {shown['query_loss_before']:.4f} to "
        f"{shown['query_loss_after']:.4f}{median}."
    )
    if is_chosen:
        print(
            f"One Newton step of alpha {shown['alpha']:.3g}, alpha / N "
            f"{shown['alpha_over_N']:.3g} (chosen by --unlearn_lr {AUTO})."
        )
    print(f"Picture: {printable(folder / 'visualization.jpg')}")
    if len(ranking.warnings) > len(study.fisher.warnings) and not is_chosen:
        show(f"Let the step be chosen: {remedy}")
    if "expected_missed" in shown:
        names = ("recall", "recall_low", "recall_k", "num_audited")
        print(
            f"{int(shown['rescored'].sum())} of {len(ranking)} candidates were scored, the others "
            f"estimated from the index. {describe_recall(**{name: shown[name] for name in names})}"
        )


def print_removal(
    folder: Path,
    query: TrainingSet,
    ranking: Ranking,
    chosen: Sequence[int],
    top_k: int,
    box: Box | None,
) -> None:
    """Prints a query's table by removal, and what its scores are. chosen: rows of the images that are
    chosen together; box: what of its picture counts."""
    place = name_place(box)
    ranking.show(top_k, f'{query.ids[0]}{place and f",{place}"}: "{query.captions[0]}"')
    print(f"\nScored by removal: {REMOVAL_MEANING}.")
    ranks = {int(row): rank for rank, row in enumerate(ranking.order, 1)}
    names = [ranking.names[row] for row in chosen]
    if told := describe_set(names, [ranks[row] for row in chosen], top_k):
        show(told)
    print(f"Picture: {printable(folder / 'visualization.jpg')}")
