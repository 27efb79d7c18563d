"""How much every candidate's loss rises when a query is unlearned: three ways, from exact to fast.

exact: the difference of two losses, [AbU] Eq. 6. midpoint: the derivative along the weight change,
at its midpoint: one forward and backward pass a query, no rounding of a difference. gradient: first
and second order at the original weights: one forward pass and a few backward ones for all queries
of a model together.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from ..advice import index_command, loss_command
from ..errors import UserError
from ..models.pipelines import changed_weights
from ..storage.hashes import digest, hash_file
from ..storage.reading import read_array, read_tensors
from ..storage.records import check_record, record_path
from .derivatives import PROBES, gradient_dots, second_order_dots
from .influence import best_view, loss_changes
from .losses import changed_losses, chunk_noise, loss_identity, rows_of, score_rows
from .shortlist import choose_images, estimate_recall
from .sweeps import Sweep, adopt_losses, cache_columns, cache_losses

AUTOCAST = {
    "fp32": None,
    "tf32": None,
    "bf16": torch.bfloat16,
}  # precision -> dtype of the denoiser's products in a derivative
# queries whose weight changes are in memory at once, where one sweep or one pass over an index
# serves them all
MANY = 64
# queries whose losses one pass gives: enough to share what is the same for all, few enough to show
# results soon
TOGETHER = 5
SHORTLIST, AUDIT, RECALL_OF = 400, 100, 100
AUDITED = "groups by estimate, each query its own"  # which images an audit takes: in records


def check_scoring(args):
    """Raises UserError where a way of scoring does not go with the other flags."""
    given = [f"--{flag}" for flag in ("shortlist", "audit") if getattr(args, flag) is not None]
    if given and not args.index:
        raise UserError(
            f"{given[0]}: means nothing without --index; build one: {index_command(args)} and "
            f"give --index results/index"
        )
    if args.index and (args.scoring == "gradient" or args.compat):
        raise UserError(
            "--index: ranks all images by their gradients already; score its shortlist with "
            "--scoring exact or midpoint, "
            "without --compat"
        )
    if args.scoring == "exact" and args.precision == "bf16":
        raise UserError(
            "--precision bf16: the difference of two losses is lost in its rounding; give "
            "--scoring midpoint or gradient"
        )
    if args.scoring != "exact" and args.compat:
        raise UserError(
            f"--compat {args.compat}: the published program knows --scoring exact only, found "
            f"{args.scoring}"
        )
    if (args.scoring != "exact" or args.index) and args.weight_selection != "cross-attn-kv":
        raise UserError(
            f"{'--index' if args.index else f'--scoring {args.scoring}'}: takes the derivative "
            f"through keys and values; "
            f"give --weight_selection cross-attn-kv, found {args.weight_selection}, or --scoring "
            f"exact"
        )
    args.shortlist = args.shortlist or SHORTLIST
    args.audit = AUDIT if args.audit is None else args.audit


def scoring_settings(args):
    """Identity of how queries were scored, the same for all that may be compared."""
    return {
        "scoring": args.scoring,
        **(
            {"shortlist": args.shortlist, "audit": args.audit, "audited": AUDITED}
            if args.index
            else {}
        ),
    }


def make_sweep(custom, images, grid, args):
    """The sweep over a set of images, and the identity of what it measures."""
    return (
        Sweep(images, grid, args.loss_batch_size, args.noise_seed, args.compat),
        loss_identity(
            custom, images, grid, args.noise_seed, args.precision, args.compat, args.loss_batch_size
        ),
    )


def load_losses(custom, path, images, grid, args):
    """Losses before unlearning, [2n] float32, checked against their record."""
    sweep, identity = make_sweep(custom, images, grid, args)
    if args.compat and not record_path(path).exists():
        adopt_losses(sweep, custom, path, identity, loss_command(args))
    check_record(
        path,
        identity,
        f"give the flags it was made with, or run: {loss_command(args, overwrite=True)}",
    )
    return read_array(path, "losses", mmap=False)


def score_exact(custom, changes, images, name, before, grid, args, later):
    """L(z, unlearned) - L(z, theta0) of one query: [[2n]] float64. Source: [AbU] Eq. 6."""
    sweep, identity = make_sweep(custom, images, grid, args)
    files = [
        (change.parent / f"{name}_loss.npy", {**identity, "weight_change": hash_file(change)})
        for change in (*changes, *later)
    ]
    if args.weight_selection == "cross-attn-kv":
        with changed_losses(
            custom.denoiser, [read_tensors(change) for change in (*changes, *later)]
        ) as measure_of:
            [after] = cache_columns(
                sweep,
                custom,
                [files[0][0]],
                [files[0][1]],
                measure_of([0]),
                args.overwrite,
                files[1:],
                lambda numbers: measure_of([0, *(1 + number for number in numbers)]),
            )
    else:
        with changed_weights(custom.denoiser, read_tensors(changes[0])):
            after = cache_losses(sweep, custom, *files[0], args.overwrite)
    return [loss_changes(before, after)]


def score_midpoint(custom, changes, images, name, before, grid, args, later):
    """The derivative along the change of one query, where the weights have gone half of it: [[2n]]
    float32."""
    with changed_weights(
        custom.denoiser, {name: delta / 2 for name, delta in read_tensors(changes[0]).items()}
    ):
        return score_derivatives(
            custom, changes, images, name, grid, args, gradient_dots, {"scoring": "midpoint"}
        )


def score_gradients(custom, changes, images, name, before, grid, args, later):
    """First and second order of the loss change of each query at the original weights:
    [queries][2n] float32."""
    return score_derivatives(
        custom,
        changes,
        images,
        name,
        grid,
        args,
        second_order_dots,
        {"scoring": "gradient", "probes": PROBES},
    )


def score_derivatives(custom, changes, images, name, grid, args, measure_of, scheme):
    """What a measure of derivatives says of each weight change, cached beside it: [queries][2n]
    float32."""
    sweep, identity = make_sweep(custom, images, grid, args)
    identities = [{**identity, "weight_change": hash_file(change), **scheme} for change in changes]
    tensors = [
        {name: delta.to(custom.device) for name, delta in read_tensors(change).items()}
        for change in changes
    ]
    return cache_columns(
        sweep,
        custom,
        [change.parent / f"{name}_change.npy" for change in changes],
        identities,
        measure_of(tensors, AUTOCAST[args.precision]),
        args.overwrite,
    )


SCORINGS = {"exact": score_exact, "midpoint": score_midpoint, "gradient": score_gradients}


def score_queries(custom, changes, image_sets, before, grid, args, later=()):
    """Loss changes of every candidate for each of some queries: [{name of the image set: [2n]},
    ...].

    changes: paths of their weight changes, one of them, or with gradient scoring up to MANY;
    before: {name: losses [2n]} and later: paths of the changes of a few queries that come next, of
    exact scoring alone: it prepares them in the same passes. Everything is kept beside the weight
    changes: killed and run again it goes on.
    """
    columns = {
        name: SCORINGS[args.scoring](
            custom, changes, images, name, before.get(name), grid, args, later
        )
        for name, images in image_sets.items()
    }
    return [
        {name: column[query] for name, column in columns.items()} for query in range(len(changes))
    ]


def audit_seed(args, query):
    """The seed of a query's audit: each query has its own, or all would audit the same ranks of
    their estimates."""
    return int(digest(args.seed, "audit", query), 16)


def score_shortlists(custom, names, changes, image_sets, before, index, grid, args):
    """Loss changes of every candidate for each of some queries, as `score_queries` gives them, and
    what is known of them: the index's estimate for most, scored for its best `args.shortlist`
    images, `args.audit` others and the exemplars. names: of the queries."""
    scored = []
    for query, change, estimates in zip(
        names, changes, index.estimate([read_tensors(change) for change in changes])
    ):
        images, best = image_sets["laion"], best_view(estimates)
        shortlist, audit = choose_images(best, args.shortlist, args.audit, audit_seed(args, query))
        kept = np.sort(np.concatenate([shortlist, audit]))
        rows = rows_of(kept, len(images), images.latents.shape[0])
        names = {name: "laion_shortlist" if name == "laion" else name for name in image_sets}
        sets = {
            names[name]: images.take(kept.tolist()) if name == "laion" else images
            for name, images in image_sets.items()
        }
        losses = {
            names[name]: values[rows] if name == "laion" else values
            for name, values in before.items()
        }
        [found] = score_queries(custom, [change], sets, losses, grid, args)
        mixed = estimates.astype(np.float64)
        mixed[rows] = found["laion_shortlist"]
        k = min(RECALL_OF, len(shortlist))
        recall, low = estimate_recall(
            best, best_view(mixed), shortlist, audit, k, audit_seed(args, query)
        )
        rescored = {
            name: np.isin(np.arange(len(images)), kept)
            if name == "laion"
            else np.full(len(images), True)
            for name, images in image_sets.items()
        }
        scored.append(
            (
                {**found, "laion": mixed},
                {
                    "rescored": np.concatenate(list(rescored.values())),
                    "recall": recall,
                    "recall_low": low,
                    "expected_missed": k * (1 - recall),
                    "recall_k": k,
                    "num_audited": len(audit),
                },
            )
        )
    return scored


def own_losses(custom, query, change, grid, args):
    """The query's own loss before and after unlearning: how far it was unlearned."""
    rows, shown = np.arange(1), []
    with ThreadPoolExecutor(1) as pool, torch.no_grad():
        normals = chunk_noise(query, rows, grid, args.noise_seed, pool)
        for weights in {}, change:
            with changed_weights(custom.denoiser, weights):
                shown.append(
                    float(score_rows(custom, query, rows, grid, normals, args.loss_batch_size)[0])
                )
    return shown
