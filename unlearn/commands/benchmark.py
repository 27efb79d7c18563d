"""Measures how fast and how faithfully training images are scored: the published procedure and each
of ours.

    python -m unlearn benchmark                                    # the emoji world, all of its images
    python -m unlearn benchmark --num_images 300 --num_exact 1     # ... in minutes on two cores, not in hours
    python -m unlearn benchmark --num_images 20000 --relative_change --procedures published exact-fp32 index
    python -m unlearn benchmark --architecture sd14 --device cuda  # Stable Diffusion v1.4's UNet, seeded weights, no download
    python -m unlearn benchmark --architecture mscoco --device cuda --scaling

A sample is one view of one image at one timestep. Seconds a query are those of unlearning and of
scoring apart; the share is that of the machine's own matrix product of the same precision, measured
in the same run. Beside each speed stands how faithful it is: Spearman and the overlap of the top
100 with float32 loss differences with TensorFloat-32 off, the published procedure's with such
differences under its own noise. Writes a table and results/benchmark/ARCHITECTURE.json.
"""

import math
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from ..attribution.settings import SHORTLIST
from ..benchmark.architectures import (
    CONFIGURATIONS,
    DAMPING,
    SELECTION,
    World,
    generate_queries,
    load_published,
    multiply_images,
    seeded_world,
)
from ..benchmark.draws import measure_draws
from ..benchmark.procedures import ON_CUDA_ONLY, PROCEDURES, UNASKED_ON_CUDA_ONLY, reference
from ..benchmark.scaling import measure_scaling
from ..benchmark.settings import BenchmarkSettings
from ..benchmark.tables import print_tables
from ..benchmark.workloads import Bench, make_row, prepare
from ..datasets.preparation import count_images
from ..datasets.settings import AUTO
from ..errors import UserError
from ..noise import timestep_grid
from ..runtime.programs import log
from ..storage.artifacts import write_json
from ..storage.records import circumstances
from .flags import Parser, add_flags, make_parser, resolve
from .inputs import find_fisher, load_fisher, load_model, prepare_training_set, warn_of_fisher

# Defaults; those of emoji that are not here stand in its dataset.json. target_draws: samples of a
# query's unlearning, as published.
PRESETS = {
    "emoji": {"gradient_batch_size": 200},
    "sd14": {
        "num_images": 500,
        "batch_size": 200,
        "time_samples": 10,
        "gradient_batch_size": 20,
        "unlearn_batch_size": 16,
        "unlearn_grad_accum_steps": 10,
        "target_draws": 16_000,
    },
    "mscoco": {
        "num_images": 1000,
        "batch_size": 8000,
        "time_samples": 20,
        "gradient_batch_size": 1000,
        "unlearn_batch_size": 80,
        "unlearn_grad_accum_steps": 10,
        "target_draws": 50_000,
    },
}
SCALING_SIZES = [1_000, 10_000, 100_000]


def add_measured_flags(parser: Parser) -> None:
    """Adds the flags of what is measured: images, queries, steps, procedures."""
    parser.add_argument(
        "--num_images",
        type=int,
        help="training images (default: emoji all, sd14 500, mscoco 1,000)",
    )
    parser.add_argument(
        "--num_queries",
        type=int,
        default=20,
        help="queries unlearned, and scored at once by gradients (default 20)",
    )
    parser.add_argument(
        "--num_exact",
        type=int,
        default=3,
        help="queries that fidelity is averaged over, each by sweeps (default 3)",
    )
    parser.add_argument(
        "--relative_change",
        type=float,
        nargs="*",
        default=[0.2],
        help="sizes of the weight change, beside the natural one of trained models (default 0.2)",
    )
    parser.add_argument(
        "--shortlist",
        type=int,
        default=SHORTLIST,
        help=f"images that the index leaves to be scored (default {SHORTLIST})",
    )
    parser.add_argument("--procedures", nargs="+", help=f"only these of {', '.join(PROCEDURES)}")


def add_cost_flags(parser: Parser) -> None:
    """Adds the flags of passes, and of what else is measured beside the procedures."""
    parser.add_argument(
        "--gradient_batch_size",
        type=int,
        help="noisy samples in one forward and backward pass; memory only",
    )
    parser.add_argument("--unlearn_batch_size", type=int, help="samples in one gradient of a query")
    parser.add_argument(
        "--unlearn_grad_accum_steps", type=int, help="such gradients in a query's one Newton step"
    )
    parser.add_argument(
        "--target_images",
        type=int,
        default=100_000,
        help="seconds a query are given for so many too, from the rates",
    )
    parser.add_argument(
        "--fisher_samples",
        type=int,
        default=200,
        help="gradient samples of a seeded model's Fisher (default 200)",
    )
    parser.add_argument(
        "--scaling",
        type=int,
        nargs="*",
        metavar="IMAGES",
        help="also measure made-up training sets of these sizes "
        f"(default {' '.join(map(str, SCALING_SIZES))})",
    )
    parser.add_argument(
        "--draws",
        type=int,
        nargs="+",
        default=[],
        help="also measure unlearning with so many draws against 16,000 published ones",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of weights, images, queries and noise (default 0)"
    )
    parser.add_argument("--output", type=Path, help="default results/benchmark/ARCHITECTURE.json")


def parse_arguments(argv: Sequence[str] | None) -> tuple[Namespace, dict]:
    """The command line, resolved: (args, settings)."""
    parser = make_parser(__doc__, "python -m unlearn benchmark")
    parser.add_argument(
        "--architecture", choices=PRESETS, default="emoji", help="what is measured (default emoji)"
    )
    add_flags(parser, "dataroot", "sd_version", "device", "batch_size", "time_samples")
    parser.set_defaults(dataroot="data/emoji")
    parser.add_argument(
        "--fisher_path", help="of emoji: diagonal Fisher (default sd_fisher.* of the data root)"
    )
    add_measured_flags(parser)
    add_cost_flags(parser)
    args = parser.parse_args(argv)
    for flag, value in PRESETS[args.architecture].items():
        if getattr(args, flag, None) is None:
            setattr(args, flag, value)
    settings = resolve(args)
    if args.architecture not in CONFIGURATIONS:
        args.target_draws = (
            settings["unlearn_steps"] * args.unlearn_batch_size * args.unlearn_grad_accum_steps
        )
    args.output = args.output or Path("results/benchmark") / f"{args.architecture}.json"
    return args, settings


def check(args: Namespace) -> None:
    """Resolves what `resolve` does not; raises UserError for what cannot be."""
    on_cuda = args.device.type == "cuda"
    for name in args.procedures or []:
        if name not in PROCEDURES:
            raise UserError(f"--procedures {name}: expected some of {', '.join(PROCEDURES)}")
        if name in ON_CUDA_ONLY and not on_cuda:
            raise UserError(f"--procedures {name}: there is no TensorFloat-32 on a CPU")
    args.procedures = args.procedures or [
        name for name in PROCEDURES if on_cuda or name not in UNASKED_ON_CUDA_ONLY
    ]
    args.scaling = SCALING_SIZES if args.scaling == [] else args.scaling or []
    args.num_exact = min(args.num_exact, args.num_queries)
    for flag, values in (
        ("relative_change", args.relative_change),
        ("scaling", args.scaling),
        ("draws", args.draws),
    ):
        if not all(0 < value < math.inf for value in values):
            raise UserError(f"--{flag} {' '.join(map(str, values))}: expected positive numbers")
    if args.batch_size < args.time_samples:
        raise UserError(
            f"--batch_size {args.batch_size}: the published procedure needs at least the "
            f"{args.time_samples} timesteps "
            "of an image"
        )


def measure_procedures(
    bench: Bench, names: Sequence[str], save: Callable[[list[dict]], object]
) -> list[dict]:
    """The row of each procedure; save(rows) after each. One that fails on this machine says so in
    its row."""
    rows = []
    for name in names:
        try:
            rows.append(make_row(bench, name, PROCEDURES[name](bench), reference(bench)))
        except RuntimeError as error:  # out of memory, or a compiler that is missing or breaks
            log.warning(f"{name}: {error}")
            rows.append(
                {
                    "procedure": name,
                    "note": f"failed: {type(error).__name__}: "
                    f"{(str(error).splitlines() or [''])[0]:.200}",
                }
            )
        save(rows)
    return rows


def open_world(args: Namespace, settings: dict) -> World:
    """The World of a data root whose base model is trained, such as data/emoji."""
    fisher_path = find_fisher(args)
    model = load_model(args, fuse_lora=True)
    fisher = load_fisher(model, args, SELECTION, DAMPING)
    training_set = prepare_training_set(model, args)
    warn_of_fisher(fisher, training_set, args, SELECTION)
    training_set = replace(training_set, embeddings=training_set.embeddings[:, :1])
    queries = generate_queries(model, training_set, args.num_queries, args.seed)
    if args.num_images:
        training_set = (
            training_set.first(args.num_images)
            if args.num_images <= len(training_set)
            else multiply_images(training_set, args.num_images, args.seed)
        )
    grid, rate = timestep_grid(args.time_samples, model.num_train_timesteps), settings["unlearn_lr"]
    rate = None if rate == AUTO else rate / (settings["num_train"] or count_images(args.dataroot))
    return World(
        model,
        training_set,
        grid,
        *queries,
        fisher,
        rate,
        lambda: load_published(args.sd_version, args.unet, fisher_path, args.device),
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Checks, loads, unlearns, measures, saves."""
    args, settings = parse_arguments(argv)
    check(args)
    chosen = BenchmarkSettings(
        **{field.name: getattr(args, field.name) for field in fields(BenchmarkSettings)}
    )
    with TemporaryDirectory(prefix="benchmark-") as folder:
        if args.architecture in CONFIGURATIONS:
            world = seeded_world(
                args.architecture, CONFIGURATIONS[args.architecture], chosen, Path(folder)
            )
        else:
            world = open_world(args, settings)
        bench = prepare(world, chosen, Path(folder))
        settings = {
            name: value if isinstance(value, (int, float, list)) else str(value)
            for name, value in vars(args).items()
        }
        report = {
            "settings": settings,
            "circumstances": circumstances(args.device),
            "threads": torch.get_num_threads(),
            "num_images": len(world.training_set),
            "timesteps": world.grid,
            "rows": [],
            "draws": [],
            "scaling": [],
        }

        def save(rows):
            report.update(rows=rows)
            write_json(args.output, report)

        rows = measure_procedures(bench, args.procedures, save)
        if args.draws:
            report["draws"] = measure_draws(bench, args.draws)
            save(rows)
        if args.scaling:
            report["scaling"] = measure_scaling(bench, args.scaling)
            save(rows)
    print_tables(report, args.target_images)
    log.info(f"{args.output}: {len(rows)} procedures")
