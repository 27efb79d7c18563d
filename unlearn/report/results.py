"""What a query ends in: influence files, a table and a picture."""

import csv
import io
import pickle
from pathlib import Path

import numpy as np

from ..advice import influence_command, loss_command
from ..attribution.influence import best_view, find_warnings, rank_images
from ..datasets.pictures import load_image
from ..datasets.settings import AUTO
from ..errors import UserError
from ..runtime.printing import printable, show
from ..runtime.programs import log
from ..storage.artifacts import whole_file
from ..storage.records import record_path, write_record
from .figures import TILE, draw_influence


def load_picture(path):
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


def missing_losses(path, args):
    """The error of losses that were never cached."""
    return UserError(f"{path}: no cached losses yet; make them: {loss_command(args)}")


def write_csv(path, header, rows):
    """Writes a CSV file; text in it is `printable`, so that a row is a line."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows(
        [
            [printable(cell) if isinstance(cell, (str, Path)) else cell for cell in row]
            for row in [header, *rows]
        ]
    )
    with whole_file(path) as file:
        file.write(text.getvalue().encode())


def print_table(title, header, rows):
    """Prints rows under a header, columns aligned; numbers to the right."""
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    show("", title)
    for row in [header, ["-" * width for width in widths], *rows]:
        show("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def list_candidates(image_sets, influence, ranking):
    """One row a candidate, most influential first: rank, id, caption, score, exemplar or not,
    path."""
    ids, captions, paths = (
        [value for images in image_sets.values() for value in getattr(images, kind)]
        for kind in ("ids", "captions", "paths")
    )
    num_exemplars = len(image_sets.get("exemplar", ()))
    return [
        [
            rank + 1,
            ids[index],
            captions[index],
            float(influence[index]),
            bool(index < num_exemplars),
            paths[index],
        ]
        for rank, index in enumerate(ranking)
    ]


def write_ranking(folder, candidates, warnings):
    """Writes influence.csv; what there is to warn of stands in every row, so that a part of the
    table keeps it. candidates: of `list_candidates`."""
    header = ["rank", "id", "caption", "score", "exemplar", "path"]
    if warnings:
        header, candidates = (
            [*header, "warning"],
            ([*row, "; ".join(warnings)] for row in candidates),
        )
    write_csv(folder / "influence.csv", header, candidates)


def write_picture(folder, task, dataroot, top, warnings):
    """Writes visualization.jpg: a query, its most influential images and what there is to warn of.
    top: the first of `list_candidates`."""
    pictures = [
        (load_picture(path), f"{rank}. {caption} ({score:+.2g})", exemplar)
        for rank, _, caption, score, exemplar, path in top
    ]
    jpeg = io.BytesIO()  # Pillow's own writing to a file does not say that the disk is full
    draw_influence(
        load_image(f"{dataroot}/{task.synth_image_path}"), task.prompt, pictures, warnings
    ).save(jpeg, "JPEG", quality=92)
    with whole_file(folder / "visualization.jpg") as file:
        file.write(jpeg.getvalue())


def describe_recall(recall, recall_low, recall_k, num_audited):
    """What an audit says of a shortlist, in a sentence."""
    if np.isnan(recall):
        return (
            f"An audit of {num_audited} others does not tell how many of the best {recall_k} "
            f"the shortlist misses: give --audit 100."
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


def describe_step(shown, args):
    """A line that says which step was chosen, "" where it was given."""
    if args.unlearn_lr != AUTO:
        return ""
    return (
        f"One Newton step of alpha {shown['alpha']:.3g}, alpha / N "
        f"{shown['alpha_over_N']:.3g} (chosen by --unlearn_lr {AUTO}).\n"
    )


def median_change(changes):
    """Median over the images of the mean of their views' loss changes, [2n]: the larger view, which
    ranks an image, would be well above 0 from the noise of the two alone."""
    return float(np.median(changes.reshape(2, -1).mean(axis=0)))


def save(folder, task, image_sets, changes, args, shown, identity, of_fisher=()):
    """Ranks the candidates (exemplars first, then the training set) and writes influence.npz, .csv,
    .pkl and the picture; prints the table.

    changes: of the losses, {"exemplar": [2n], "laion": [2N]}, of the base model's queries without
    the first; shown: what stands in influence.npz beside the scores; of_fisher: what there is to
    warn of the Fisher. What there is to warn of stands in all of them, in the CSV as a further
    column.
    """
    of_step = find_warnings(
        shown["relative_weight_change"], shown["query_loss_before"], shown["query_loss_after"]
    )
    warnings = [*of_step, *of_fisher]
    influence = np.concatenate([best_view(changes[name]) for name in image_sets])
    if not np.isfinite(
        [
            *influence,
            shown["query_loss_before"],
            shown["query_loss_after"],
            shown["relative_weight_change"],
        ]
    ).all():
        raise UserError(
            f"{folder}: a score, or a loss of the query itself, is NaN or infinite; the weights "
            f"have diverged (try a smaller "
            "--unlearn_lr or a larger --damping)"
        )
    shown = {**shown, "median_change": median_change(changes["laion"])}
    ranking = rank_images(influence)
    candidates = list_candidates(image_sets, influence, ranking)
    path = folder / "influence.npz"
    record_path(path).unlink(missing_ok=True)
    write_ranking(folder, candidates, warnings)
    with whole_file(
        folder / "influence.pkl"
    ) as file:  # for those who read the published program's; never read here
        pickle.dump({"influence": influence, "rank": ranking}, file)
    top = candidates[: args.top_k]
    write_picture(folder, task, args.dataroot, top, warnings)
    with whole_file(path) as file:
        np.savez(
            file,
            ids=np.array([id for images in image_sets.values() for id in images.ids]),
            influence=influence,
            rank=ranking,
            is_exemplar=np.arange(len(influence)) < len(task.exemplar_paths),
            warnings=np.array(warnings, str),
            **shown,
        )
    write_record(
        path,
        identity,
        found={
            "alpha": shown["alpha"],
            "alpha_over_N": shown["alpha_over_N"],
            "warnings": warnings,
        },
    )
    print_table(
        f'{task.synth_image_path}: "{task.prompt}"',
        ["rank", "score", "exemplar", "id", "caption"],
        [
            [rank, f"{score:+.3e}", "yes" if exemplar else "", id, caption]
            for rank, id, caption, score, exemplar, _ in top
        ],
    )
    print(
        f"\n{args.weight_selection} moved by {shown['relative_weight_change']:.2%}. The query's "
        f"own loss went from "
        f"{shown['query_loss_before']:.4f} to {shown['query_loss_after']:.4f}, the median "
        f"training image's by {shown['median_change']:+.1e}.\n"
        f"{describe_step(shown, args)}Picture: {printable(folder / 'visualization.jpg')}"
    )
    for warning in warnings:
        print(f"Warning: {warning}.")
    if of_step and args.unlearn_lr != AUTO:
        print(
            f"Let the step be chosen: "
            f"{influence_command(args, unlearn_lr=AUTO, unlearn_steps=1, overwrite=True)}"
        )
    if "expected_missed" in shown:
        print(
            f"{int(shown['rescored'].sum())} of {len(influence)} candidates were scored, the "
            f"others estimated from the index. "
            f"{describe_recall(**{name: shown[name] for name in ('recall', 'recall_low', 'recall_k', 'num_audited')})}"
        )
