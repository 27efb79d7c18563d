"""Evaluation against retrained models: which measures, which tables, which CSV files."""

import io
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..advice import write_command
from ..attribution.influence import is_indifferent, is_undecided
from ..datasets.tasks import load_tasks
from ..errors import UserError
from ..report.figures import draw_grid
from ..report.results import load_picture, write_csv
from ..runtime.printing import show
from ..storage.artifacts import whole_file
from .datamodels import (
    choose_power,
    leave_models_out,
    mean_interval,
    predict,
    raise_scores,
    spearman,
)
from .plots import draw_plots
from .rankings import count_warnings
from .removal import (
    MEASURES,
    SAME_PICTURE,
    asked_queries,
    equivalent_rows,
    find_maker,
    find_references,
    floor_rows,
    group_models,
    measure_removals,
    other_full_rows,
    paired_rows,
    random_changes,
    random_deviations,
    removal_rows,
    retention_rows,
)
from .retrained import check_queries, check_removed_images, query_digests, read_retrained
from .scores import OURS, RANDOM, random_scores, read_methods, write_scores
from .tables import equivalent_table, lds_table, paired_table, removal_table, retention_table

FEWEST_SUBSETS, FEWEST_TUNING = 3, 10
LDS = ("lds", "low", "high", "ours_minus", "ours_minus_low", "ours_minus_high")
RETRAINED_TIMESTEPS = 200  # of `retrain`'s losses, by default
LDS_COLUMNS = (
    "method",
    *LDS,
    "power",
    *(f"powered_{name}" for name in LDS),
    "tuning_lds",
    "tuning_queries",
    "queries",
    "models",
)
COLUMNS = {
    "lds": LDS_COLUMNS,
    "lds_queries": ("query", "method", "lds", "powered_lds"),
    "leave_k_out": (
        "method",
        "k",
        "queries",
        "models",
        "dL",
        "dL_error",
        "mse",
        "mse_error",
        "similarity",
        "similarity_error",
    ),
    "leave_k_out_paired": (
        "baseline",
        "k",
        "queries",
        *(name + end for name in MEASURES for end in ("", "_error", "_p")),
    ),
    "retention": (
        "method",
        "k",
        "models",
        "own_dL",
        "others_dL",
        "others_dL_error",
        "own_mse",
        "others_mse",
        "others_mse_error",
    ),
    "equivalent": ("method", "k", "queries", "dL", "random_images", "low", "high", "most_tried"),
}


def check_training_set(scores, models, source):
    """Raises UserError where the scores are of another training set than the retrained models'."""
    first = models[0].identity
    for each in scores.values():
        if each.training_set != first["training_set"] or len(each.ids) != first["num_images"]:
            raise UserError(
                f"{source}: {each.method} scores {len(each.ids)} training images, the models of "
                f"--retrained were trained on "
                f"{first['num_images']}{'' if len(each.ids) != first['num_images'] else ' others: of another data root or encoding'}"
            )


def maker_seed(models):
    """The seed of the full model that makes the queries again; None where none does, or pictures
    were not made."""
    return next(
        (
            model.seed
            for model in models
            if model.kind == "full" and (model.mse <= SAME_PICTURE).all()
        ),
        None,
    )


def largest_group(models):
    """Models on random subsets of one size and of one seed: the sum of the scores of larger subsets
    says little else than how large they are, and a seed shifts a query's loss by more than most
    images do. Those of the seed of the queries' own model where there are enough, and of these the
    most (the larger subset, the lower seed of equally many)."""
    groups = {}
    for model in models:
        if model.kind == "subset":
            groups.setdefault((model.num_removed, model.seed), []).append(model)
    own = maker_seed(models)
    is_own = lambda group: group[0].seed == own and len(group) >= FEWEST_SUBSETS
    return max(
        (groups[key] for key in sorted(groups)),
        key=lambda group: (is_own(group), len(group)),
        default=[],
    )


def other_seed_line(models):
    """That the LDS is of models of another seed than the queries' model, or None."""
    used, own = largest_group(models), maker_seed(models)
    if not used or own in (None, used[0].seed):
        return None
    return (
        f"The LDS is of models with seed {used[0].seed}, which is not the seed of the queries' "
        f"model ({own}): a query's loss is "
        "lower under its own model's seed."
    )


def left_out_line(models):
    """Which models on random subsets the LDS leaves out, or None."""
    used, subsets = largest_group(models), [model for model in models if model.kind == "subset"]
    if len(used) in (0, len(subsets)):
        return None
    return (
        f"The LDS is of the {len(used)} models on {int(used[0].kept.sum())} random images with "
        f"seed {used[0].seed}; the "
        f"{len(subsets) - len(used)} on subsets of another size or with another seed are left "
        f"out: ranks count among alike models only."
    )


@dataclass(frozen=True)
class Measured:
    """Some queries: what methods say of the training images, and how the models of random subsets
    explain the queries."""

    values: dict  # {method: scores [queries, N]}
    kept: np.ndarray  # [models, N] bool
    losses: np.ndarray  # [queries, models]


def find_subsets(values, models, command):
    """Measured of the largest group of subset models; None where there are none. Raises UserError
    where there are too few (command: that makes more)."""
    subsets = largest_group(models)
    if 0 < len(subsets) < FEWEST_SUBSETS:
        raise UserError(
            f"{subsets[0].path.parent}: the LDS needs at least {FEWEST_SUBSETS} models on random "
            f"subsets of one size "
            f"and seed, found {len(subsets)}; make more: {command}"
        )
    if subsets:
        return Measured(
            values,
            np.array([model.kept for model in subsets]),
            np.array([model.losses for model in subsets]).T,
        )


def measure_lds(measured, powers):
    """LDS after each method's power: ({method: (mean, low, high, ours minus it, low, high)},
    {method: [queries]}); the last three are empty for ours itself."""
    predictions = {
        method: predict(raise_scores(array, powers[method]), measured.kept)
        for method, array in measured.values.items()
    }
    by_query = {method: spearman(array, -measured.losses) for method, array in predictions.items()}
    left_out, found = leave_models_out(predictions, measured.losses), {}
    for method, array in by_query.items():
        difference = [""] * 3
        if OURS in by_query and method != OURS:
            difference = mean_interval(
                by_query[OURS] - array, left_out[OURS] - left_out[method], largest=2
            )
        found[method] = (*mean_interval(array, left_out[method]), *difference)
    return found, by_query


def lds_rows(measured, tuning):
    """LDS of every method, of its scores as they are and after the power that is best on the tuning
    queries (empty where there are none): rows of COLUMNS["lds"], and those of
    COLUMNS["lds_queries"] less the query, [queries][methods]."""
    if measured is None:
        return [], []
    plain, plain_queries = measure_lds(measured, dict.fromkeys(measured.values, 1))
    chosen = (
        {
            method: choose_power(scores, tuning.kept, tuning.losses)
            for method, scores in tuning.values.items()
        }
        if tuning
        else {}
    )
    powered, powered_queries = {}, {}
    if chosen:
        powered, powered_queries = measure_lds(
            measured, {method: power for method, (power, _) in chosen.items()}
        )
    num_queries, num_models = measured.losses.shape
    rows = []
    for method, numbers in plain.items():
        power, tuning_lds = chosen.get(method, ("", ""))
        rows.append(
            (
                method,
                *numbers,
                power,
                *powered.get(method, [""] * len(LDS)),
                tuning_lds,
                len(tuning.losses) if tuning else 0,
                num_queries,
                num_models,
            )
        )
    return rows, [
        [
            (method, float(array[query]), float(powered_queries[method][query]) if chosen else "")
            for method, array in plain_queries.items()
        ]
        for query in range(num_queries)
    ]


def deviation_line(models):
    """What the subsets do to the losses, and what the seed does, which the subsets share with the
    model that made the queries: a query's loss is low under its own model's seed, so that the two
    deviations cannot be subtracted."""
    full, subsets = [model for model in models if model.kind == "full"], largest_group(models)
    deviation = lambda group: np.std([model.losses for model in group], axis=0, ddof=1).mean()
    seeds = ", ".join(str(seed) for seed in sorted({model.seed for model in subsets}))
    line = f"A query's loss deviates by {deviation(subsets):.2e} over the subsets (seed {seeds})"
    return line + (
        f" and by {deviation(full):.2e} over the seeds of {len(full)} full models."
        if len(full) > 1
        else "."
    )


def full_command(args, models, seeds):
    """The command that trains and measures full models beside those that are there."""
    first = models[0].identity
    timesteps = first["timesteps"] if first["timesteps"] != RETRAINED_TIMESTEPS else None
    return write_command(
        "retrain",
        args,
        "full",
        "--seeds",
        *map(str, seeds),
        output=args.retrained,
        loss_time_samples=timesteps,
        noise_seed=first["noise_seed"],
        features=first.get("features"),
    )


def other_seed(row, seed):
    """A row of a method whose models are of another seed than the queries' model, by a name that
    says so."""
    return f"{row[0]}, seed {seed}", *row[1:]


def evaluate_seed(models, reference, maker, queries):
    """Rows by the name of their CSV file and the curve of random removal, of the models of one
    seed. Pictures of another seed's models are no measure: without any removal they are others than
    the queries."""
    is_maker = reference is maker
    if not is_maker:
        models = [
            replace(
                model, mse=np.full(len(queries), np.nan), similarity=np.full(len(queries), np.nan)
            )
            for model in models
        ]
    values, counts = measure_removals(models, reference, queries)
    own = {key: value for key, value in values.items() if key[0] != RANDOM}
    curve = random_changes(models, reference)
    rows = {
        "leave_k_out": removal_rows(values, counts),
        "leave_k_out_paired": paired_rows(values),
        "retention": retention_rows(models, reference, queries),
        "equivalent": equivalent_rows(values, curve, random_deviations(models)),
    }
    if not is_maker:
        rows = {
            name: [other_seed(row, reference.seed) for row in of_kind]
            for name, of_kind in rows.items()
        }
    return rows, (asked_queries(own, len(queries)), curve), bool(own)


def evaluate_removals(models, references, maker, queries):
    """Rows by the name of their CSV file, the curve of random removal, and its notices: what is
    there is measured, each seed's models against their own full model. references: {seed: model},
    maker: the one of them that made the queries, or None."""
    if maker is None:
        return (
            {},
            None,
            [
                "No full model yet: leave-K-out, retention and equivalent numbers need the one "
                "that made the queries."
            ],
        )
    seeds = sorted(references, key=lambda seed: (seed != maker.seed, seed))
    parts = [
        evaluate_seed(
            [model for model in models if model.seed == seed], references[seed], maker, queries
        )
        for seed in seeds
    ]
    rows = {name: [row for part, _, _ in parts for row in part[name]] for name in parts[0][0]}
    asked, curve = parts[0][1]
    rows["leave_k_out"] = floor_rows(models, maker, asked) + rows["leave_k_out"]
    rows["retention"] += other_full_rows(models, maker, queries)
    notices = (
        []
        if any(own for _, _, own in parts)
        else ["No models without the top K of a method yet: leave-K-out shows the noise only."]
    )
    unasked = sum(model.query is not None and model.query not in queries for model in models)
    if any(
        part["equivalent"]
        and random_deviations([model for model in models if model.seed == seed]) is None
        for seed, (part, _, _) in zip(seeds, parts)
    ):
        notices.append(
            "No number of random images was removed by two models: the intervals of equivalent "
            "numbers leave out how such models "
            "deviate. Train more of each K (retrain random, with --count 8)"
        )
    if unasked:
        notices.append(
            f"{unasked} models were trained without images of queries that are not in this task "
            f"file; left out."
        )
    if len({row[2] for row in rows["leave_k_out"] if row[1]}) > 1:
        notices.append(
            "Not every method and K has the same queries yet (column queries): compare them in "
            "the paired table."
        )
    return rows, (asked, curve), notices


def print_tables(rows, lds, models, notices, queries):
    """All tables that have rows, in Markdown."""
    kinds = {
        kind: sum(model.kind == kind and model.query in (None, *queries) for model in models)
        for kind in ("full", "subset", "without")
    }
    print(
        f"{kinds['full']} full models, {kinds['subset']} on random subsets, {kinds['without']} "
        f"without chosen or random images\n"
    )
    tuning_queries = lds[0][LDS_COLUMNS.index("tuning_queries")] if lds else 0
    powers = f"; powers chosen on {tuning_queries} further queries" if tuning_queries else ""
    tables = {
        "Linear datamodeling score: rank correlation of summed scores with retrained losses (95 "
        "% intervals over "
        f"{'queries and models' if len(queries) > 1 else 'models, of a single query'}{powers})": [
            *lds_table(lds),
            "",
            deviation_line(models),
        ]
        if lds
        else [],
        "Leave-K-out: loss of the query, error and similarity of its picture made again; mean ± "
        "standard error over queries, each with a "
        "model of its own; random and full: over queries under the same models, whose own "
        "deviation is not in it": removal_table(rows["leave_k_out"])
        if rows.get("leave_k_out")
        else [],
        "Leave-K-out, paired by query (p: Student's t test)": paired_table(
            rows["leave_k_out_paired"]
        )
        if rows.get("leave_k_out_paired")
        else [],
        "Retention: change of the query that images were removed for, and of all others; mean ± "
        "standard error over models": retention_table(rows["retention"])
        if rows.get("retention")
        else [],
        "Equivalent number of random images: how many must be removed for the same dL (interval "
        "from drawing queries and models anew)": equivalent_table(rows["equivalent"])
        if rows.get("equivalent")
        else [],
    }
    for title, lines in tables.items():
        if lines:
            show(title, "", *lines, "")
    for notice in notices:
        show(notice)


def write_tables(rows, output):
    """Writes a CSV file of each kind of rows; undefined numbers are empty cells."""
    for name, columns in COLUMNS.items():
        cells = [["" if cell != cell else cell for cell in row] for row in rows.get(name, [])]
        write_csv(Path(output) / f"{name}.csv", columns, cells)
    print(f"Written: {', '.join(f'{name}.csv' for name in COLUMNS)} in {output}")


def draw_made_again(args, tasks, models, queries):
    """Writes made_again.jpg: each query for which images were removed, beside what the models
    without the most of them make of its prompt and seed, as far as `retrain` left the pictures
    below RESULT_DIR. A model of random removal is the first one."""
    asked = [task for task in tasks if any(model.query == task.result_name for model in models)]
    most = max((model.num_removed for model in models if model.query in queries), default=0)
    groups = {
        key: group for key, group in group_models(models, "without").items() if key[1] == most
    }
    made = [
        [
            next((model for model in group if model.query in (None, task.result_name)), None)
            for group in groups.values()
        ]
        for task in asked
    ]
    path_of = lambda model, task: (
        Path(args.result_dir) / "retrain" / model.path.stem / f"pictures/{task.result_name}.png"
    )
    if not any(
        model and path_of(model, task).exists() for task, row in zip(asked, made) for model in row
    ):
        return
    rows = [
        [(load_picture(f"{args.dataroot}/{task.synth_image_path}"), task.prompt)] for task in asked
    ]
    for task, row, models_of_row in zip(asked, rows, made):
        for model in models_of_row:
            is_there = model and path_of(model, task).exists()
            row.append(
                (
                    load_picture(path_of(model, task)),
                    f"MSE {100 * model.mse[queries.index(task.result_name)]:.1f}e-2",
                )
                if is_there
                else (None, "")
            )
    jpeg = io.BytesIO()
    draw_grid(
        ["the query", *(f"made again without {k} images by {method}" for method, k in groups)], rows
    ).save(jpeg, "JPEG", quality=92)
    with whole_file(Path(args.output) / "made_again.jpg") as file:
        file.write(jpeg.getvalue())
    print(f"Drawn: made_again.jpg, {len(rows)} queries without {most} images")


def retrain_command(args, kind, **more):
    """What makes models of a kind, measured on the queries that are evaluated."""
    return write_command("retrain", args, kind, output=args.retrained, **more)


def equal_score_lines(values, models, queries):
    """Of each method whose scores [queries, N] leave all images, or those at the K-th place, equal:
    a line that says so."""
    lines = []
    for method, scores in values.items():
        if count := sum(map(is_indifferent, scores)):
            lines.append(
                f"{method}: all images have the same score for {count} of {len(queries)} "
                f"queries: of these it says nothing, and their "
                "LDS is 0."
            )
        asked = {
            (model.query, model.num_removed)
            for model in models
            if model.method == method and model.query in queries
        }
        if count := sum(is_undecided(scores[queries.index(query)], k) for query, k in asked):
            lines.append(
                f"{method}: for {count} of {len(asked)} removals the K-th image and the next "
                f"have the same score: the order of the "
                "files decided which were removed."
            )
    return lines


def read_tuning(args, queries):
    """Task file, models and queries of --tuning_json: ({query: task file}, models), both empty
    without it. Raises UserError where one of its queries is also reported, or cannot be
    measured."""
    if not args.tuning_json:
        return {}, []
    tasks = load_tasks(args.tuning_json, args.dataroot)
    check_scratch(tasks, args.tuning_json)
    tuning = sorted(task.result_name for task in tasks)
    if both := sorted(set(tuning) & set(queries)):
        raise UserError(
            f"--tuning_json {args.tuning_json}: {both[0]} is also in {args.task_json}; a power "
            f"must be chosen on queries "
            "that are not reported"
        )
    command = retrain_command(args, "full", task_json=args.tuning_json)
    models = read_retrained(args.retrained, tuning, command)
    check_queries(models, query_digests(tasks, args.dataroot), command)
    return dict.fromkeys(tuning, args.tuning_json), models


def check_scratch(tasks, task_json):
    """Raises UserError where a query was made by a customized model."""
    for task in tasks:
        if task.exemplar_paths:
            raise UserError(
                f"{task_json}: {task.synth_image_path} has a customized model; --retrained "
                f"evaluates queries of "
                "models trained from scratch"
            )


def read_values(args, queries, tuning, models):
    """Scores by method, and those of the reported and the tuning queries: (MethodScores of all,
    {method: [queries, N]} twice)."""
    scores = read_methods(args, {**dict.fromkeys(queries, args.task_json), **tuning})
    count = len(queries)
    check_training_set(
        scores,
        models,
        f"--scores {args.scores}" if args.scores else f"--result_dir {args.result_dir}",
    )
    values = {method: each.values for method, each in scores.items()}
    if RANDOM in (args.methods or [RANDOM]) and RANDOM not in values:
        values[RANDOM] = random_scores([*queries, *tuning], models[0].identity["num_images"])
    return (
        scores,
        {method: array[:count] for method, array in values.items()},
        {method: array[count:] for method, array in values.items()},
    )


def evaluate_retrained(args, tasks):
    """Reads and checks everything, then measures, prints, and writes tables and plots; nothing is
    written before."""
    check_scratch(tasks, args.task_json)
    queries = sorted(task.result_name for task in tasks)
    models = read_retrained(args.retrained, queries, retrain_command(args, "full"))
    check_queries(models, query_digests(tasks, args.dataroot), retrain_command(args, "full"))
    tuning, tuning_models = read_tuning(args, queries)
    scores, values, tuning_values = read_values(args, queries, tuning, models)
    check_removed_images(
        models, {method: array for method, array in values.items() if method in scores}, queries
    )
    more = retrain_command(args, "subsets", count=64)
    lds, by_query = lds_rows(
        find_subsets(values, models, more), find_subsets(tuning_values, tuning_models, more)
    )
    shown = [
        model
        for model in models
        if not args.methods or model.method in (None, *args.methods, RANDOM)
    ]
    command = lambda seeds: full_command(args, models, seeds)
    can_be_made_again = all(task.seed is not None for task in tasks)
    references = find_references(shown, command)
    maker = find_maker(references, command, can_be_made_again) if references else None
    rows, curve, notices = evaluate_removals(shown, references, maker, queries)
    if maker and not can_be_made_again:
        notices.append(
            f"The task file has queries without a seed, which no model can make again: "
            f"{maker.path.stem}, the full model that "
            "explains them best, is taken for the one that made them, unchecked."
        )
    if not lds:
        notices.insert(0, "No models on random subsets yet: no LDS.")
    elif not tuning:
        notices.insert(
            0,
            "The LDS depends on how heavy the tails of scores are, not on their order alone: "
            "--tuning_json, a task file of "
            "further queries, lets evaluate choose each method's power. Compare methods by that "
            "one.",
        )
    elif len(tuning) < FEWEST_TUNING:
        notices.insert(
            0,
            f"Powers were chosen on {len(tuning)} tuning queries: another few may choose others; "
            f"give {FEWEST_TUNING} or more.",
        )
    for method, each in scores.items():
        notices += count_warnings(each.warnings, f"queries scored by {method}")
    notices += [
        *filter(None, [left_out_line(models), other_seed_line(models)]),
        *equal_score_lines(values, shown, queries),
    ]
    print_tables(rows, lds, shown, notices, queries)
    rows["lds"], rows["lds_queries"] = (
        lds,
        [(query, *row) for query, each in zip(queries, by_query) for row in each],
    )
    if not args.scores:
        for each in scores.values():
            write_scores(Path(args.output) / "scores", each, [*queries, *tuning])
    write_tables(rows, args.output)
    draw_plots(rows, curve, args.output)
    draw_made_again(
        args, tasks, [model for model in shown if maker and model.seed == maker.seed], queries
    )
