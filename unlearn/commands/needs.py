"""Tells what a run needs, before anything is loaded or bought: by a model's configuration alone.

    python -m unlearn needs                        # of the published models
    python -m unlearn needs "FLUX.1-dev" MODEL     # of some, by name or by a diffusers folder
    python -m unlearn needs MODEL --resolution 768 --images 5000 --captions 1

For each model a line for its own weights and one for a LoRA, in each precision that weights may have
(`--weights bf16`): what a GPU has to hold at most, and with gradient checkpointing, to which a run turns
where memory is short; the smallest one that does, memory while the model is loaded (in bf16 by the
precision of a folder's files, of a published model's half), disk, and the seconds that removal takes
(`attribute`). All of it is counted: parameters, tensors that are alive at once, and operations, of
which a GPU is taken to do 40 % of what its maker states, with 60 microseconds a layer and pass besides,
which were fitted to 13 models on an H200 (results/README, "On a GPU").
"""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..runtime.printing import show
from .parsing import make_parser

if TYPE_CHECKING:
    from ..models.architectures import Architecture

HEADER = (
    "model",
    "weights",
    "weights looked at",
    "operations a pass",
    "GPU memory, least",
    "smallest GPU",
    "memory",
    "disk",
    "index, A100",
    "index, H100",
    "a query, H100",
)


def parse_arguments(argv: Sequence[str] | None) -> Namespace:
    """The command line."""
    parser = make_parser(__doc__, "python -m unlearn needs")
    parser.add(
        "model",
        "models",
        nargs="*",
        metavar="MODEL",
        help="published models by name or hub's name, or diffusers folders (default all published)",
    )
    parser.add(
        "data", "--resolution", type=int, default=0, help="pixels of a side (default the model's)"
    )
    parser.add("data", "--images", type=int, default=1000, help="training images (default 1,000)")
    parser.add("data", "--captions", type=int, help="different captions (default as many)")
    args = parser.parse_args(argv)
    args.captions = args.images if args.captions is None else args.captions
    for flag in "resolution", "images", "captions":
        if getattr(args, flag) < (flag != "resolution"):
            parser.error(f"--{flag} {getattr(args, flag)}: expected a positive number")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Counts one model after the other, and prints a table."""
    args = parse_arguments(argv)
    # Here: they import torch and diffusers, which takes seconds.
    from ..models.architectures import find_published, published_architecture, read_architecture
    from ..models.published import PUBLISHED

    show(*map(line, (HEADER, ["---"] * 2 + ["---:"] * (len(HEADER) - 2))))
    for name in args.models or PUBLISHED:
        is_folder = Path(name).is_dir() and not find_published(name)
        architecture = read_architecture(name) if is_folder else published_architecture(name)
        published = find_published(name)
        own = published.resolution if published else 0
        resolution = args.resolution or own
        for weights in "fp32", "bf16":
            for lora in False, True:
                how = resolution, (args.images, args.captions), lora, weights
                show(line(describe(name, architecture, *how)))


def describe(
    name: str,
    architecture: "Architecture",
    resolution: int,
    numbers: tuple[int, int],
    lora: bool,
    weights: str,
) -> list[str]:
    """The cells of a model's line. numbers: of images, and of different captions."""
    from ..front.costs import describe_seconds
    from ..front.needs import describe_bytes, find_needs

    needs = find_needs(architecture, resolution, lora=lora, weights=weights)
    gpu = f"{needs.smallest_gpu} GB" if needs.smallest_gpu else "none"
    return [
        f"{name}, {needs.resolution} px" if not lora and weights == "fp32" else "",
        f"{weights}{', LoRA' if lora else ''}",
        f"{needs.selected / 1e6:,.1f} M",
        f"{needs.forward / 1e12:.3g} TFLOP",
        f"{describe_bytes(needs.device_bytes)}, {describe_bytes(needs.least_bytes)}",
        gpu,
        describe_bytes(needs.host),
        describe_bytes(needs.disk(*numbers)),
        *(describe_seconds(needs.seconds(numbers[0], card)) for card in ("A100", "H100")),
        describe_seconds(needs.seconds(1, "H100")),
    ]


def line(cells: Sequence[str]) -> str:
    """A line of a table in Markdown."""
    return f"| {' | '.join(cells)} |"
