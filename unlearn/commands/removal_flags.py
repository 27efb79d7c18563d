"""Flags of scoring by removal: added, checked, and made the settings of a study."""

from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..attribution.names import NAMED, REMOVAL
from ..attribution.removal import RemovalSettings
from ..attribution.removal_scores import RIDGE
from ..attribution.removal_studies import RemovalStudy
from ..datasets.repeats import read_repeats
from ..datasets.tasks import Task, find_result
from ..datasets.training_sets import TrainingSet
from ..errors import UserError
from ..evaluation.stored_records import scoring_of
from ..models.pipelines import Model
from ..runtime.printing import show
from ..storage.records import is_complete, read_record
from .flags import Parser

OWN = ("removal_timesteps", "probes", "sketch_size", "ridge", "use_repeats")
DEFAULTS = {
    "removal_timesteps": list(RemovalSettings().timesteps),
    "probes": RemovalSettings().probes,
    "sketch_size": RemovalSettings().sketch_size,
    "ridge": RIDGE,
    "use_repeats": False,
}
OF_UNLEARNING = (
    *("fisher_path", "damping", "num_train", "unlearn_lr", "unlearn_steps", "unlearn_batch_size"),
    *("unlearn_grad_accum_steps", "loss_time_samples", "index", "shortlist", "audit", "compat"),
)


def add_removal_flags(parser: Parser) -> None:
    """Adds the flags that decide the features and scores of removal."""
    parser.add(
        "scoring",
        "--removal_timesteps",
        type=int,
        nargs="+",
        metavar="T",
        help="of removal: timesteps of the noise, drawn again where one is named again (default 350 four "
        "times)",
    )
    parser.add(
        "scoring",
        "--probes",
        type=int,
        help=f"of removal: random signs of the prediction (default {DEFAULTS['probes']})",
    )
    parser.add(
        "scoring",
        "--sketch_size",
        type=int,
        help=f"of removal: numbers that a gradient is kept as (default {DEFAULTS['sketch_size']})",
    )
    parser.add(
        "scoring",
        "--ridge",
        type=float,
        help=f"of removal: lambda, as a multiple of a feature's mean square (default {RIDGE:g})",
    )
    parser.add(
        "scoring",
        "--use_repeats",
        action="store_true",
        help="of removal: an image counts as often as training saw it, by the data root's repeats",
    )


def check_removal_flags(args: Namespace) -> None:
    """Raises UserError where flags of one way of scoring are given with the other. To be asked
    before defaults are filled in, which it does for its own."""
    is_removal = args.scoring == REMOVAL
    for flag in OF_UNLEARNING if is_removal else OWN:
        if getattr(args, flag) not in (None, False):
            reason = "which unlearns nothing" if is_removal else f"only to {REMOVAL}"
            raise UserError(
                f"--{flag}: means nothing to --scoring {args.scoring}, {reason}; leave it out"
            )
    if is_removal and args.precision not in (None, "fp32"):
        raise UserError(f"--precision {args.precision}: --scoring {REMOVAL} knows fp32 alone")
    for flag in OWN if is_removal else ():
        if getattr(args, flag) is None:
            setattr(args, flag, DEFAULTS[flag])


def check_kept_results(
    args: Namespace, folder: Path, groups: Mapping[str | None, Sequence[Task]]
) -> None:
    """Raises UserError, before a model is loaded, where a result of another way of scoring stands in
    a query's place and may not be replaced: by removal, by output or by changes of losses."""
    for task in [] if args.overwrite else [task for tasks in groups.values() for task in tasks]:
        path = find_result(folder, task) / "influence.npz"
        if not is_complete(path):
            continue
        found = scoring_of(read_record(path, "give --overwrite to replace it")) or "exact"
        if found != args.scoring and {found, args.scoring} & {*NAMED}:
            raise UserError(
                f"{path}: was made by --scoring {found}, not {args.scoring}; give --overwrite to "
                f"replace it, or another --result_dir"
            )


def open_removal(
    args: Namespace, model: Model, image_sets: dict[str, TrainingSet], model_name: str
) -> RemovalStudy:
    """The study by removal of a run's flags. image_sets: candidates of the model, as in a Study."""
    settings = RemovalSettings(
        args.weight_selection,
        tuple(args.removal_timesteps),
        args.probes,
        args.sketch_size,
        args.noise_seed,
    )
    repeats: tuple[int, ...] = ()
    if args.use_repeats:
        own = read_repeats(args.dataroot, len(image_sets["laion"]))
        repeats = (1,) * len(image_sets.get("exemplar", ())) + own if own else ()
    return RemovalStudy(
        model,
        image_sets,
        Path(args.result_dir) / "removal" / model_name,
        settings,
        args.ridge,
        repeats,
        args.box,
        args.overwrite,
    )


def print_removal_plan(
    args: Namespace, groups: Mapping[str | None, Sequence[Task]], training_set: TrainingSet
) -> None:
    """Prints the plan of a run by removal: --dry_run."""
    for flag, value in vars(args).items():
        if flag not in OF_UNLEARNING:
            show(f"{flag:<26} {'none' if value == '' else value}")
    rows = args.probes * training_set.embeddings.shape[1] * len(args.removal_timesteps)
    num_exemplars = [len(tasks[0].exemplar_paths) for tasks in groups.values()]
    num_images = sum(num_exemplars) + len(groups) * len(training_set)
    num_queries = sum(map(len, groups.values()))
    print(
        f"\n{len(groups)} models, {num_queries} queries, {len(training_set)} training images\n"
        f"{rows * num_images:,} backward passes for the features, once; {rows * num_queries:,} for "
        f"the queries\n{rows * num_images * (2 * args.sketch_size + 4) / 1e6:,.1f} MB of features "
        f"on disk"
    )
