"""Answers in one command: which of these training images made this picture?

    python -m unlearn attribute picture.png --prompt "red apple" --model MODEL --images FOLDER
    python -m unlearn attribute a.png b.png --model MODEL --images FOLDER --out DIR
    python -m unlearn attribute --prompt "red apple" --seed 7 --model MODEL --images FOLDER
    python -m unlearn attribute picture.png --model BASE --lora lora.safetensors --images FOLDER
    python -m unlearn attribute picture.png --model MODEL --images FOLDER --caption "a photo of sks dog" \\
        --class_images FOLDER --class_prompt "a photo of a dog"

MODEL is what made the picture: a diffusers folder, a name on the hub, a checkpoint file, a data
root, whose dataset.json says its model, or with --base the folder of a UNet that a training run left
or of a customized model. FOLDER holds the
images that it was trained on, with captions by any convention: captions.txt, metadata.jsonl or
.csv, .txt files beside the pictures, COCO's annotations, folders such as 10_name, or one --caption
for all. The prompt is read from the picture's file where the program that made it wrote it there.
Without a picture the model makes it from --prompt and --seed. Everything is made at first use and
kept below DIR: latents and each image's features (with --scoring exact
or output curvature and losses). Killed and run again, the same command goes on; a
further picture costs its own part only. Ends in a table, a CSV file, a picture and report.html, a
page to look at and to send on.
"""

import shlex
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from ..datasets.presence import check_images, check_model, check_pictures
from ..runtime.printing import show
from .attribute_flags import add_images, add_model, add_pictures, add_scoring
from .parsing import make_parser

HIGHEST_TABLE = 1000


def parse_arguments(argv: Sequence[str] | None) -> Namespace:
    """The command line. Raises UserError where what it names is not there."""
    parser = make_parser(__doc__, "python -m unlearn attribute")
    for add in add_pictures, add_images, add_model, add_scoring:
        add(parser)
    parser.add("output", "--out", default="attribution", metavar="DIR", help="default attribution")
    parser.add("output", "--top_k", type=int, default=10, help="images in the table (default 10)")
    parser.add("running", "--device", help="cuda, cuda:N or cpu (default cuda if there is one)")
    parser.add("running", "--dry_run", action="store_true", help="say what it would cost, and stop")
    args = parser.parse_args(argv)
    if not 1 <= args.top_k <= HIGHEST_TABLE:
        parser.error(f"--top_k {args.top_k}: expected 1 to {HIGHEST_TABLE}")
    # Here: it is told before libraries are imported that take seconds.
    check_pictures(args.pictures)
    check_images(args.images)
    if args.class_images is not None:
        check_images(args.class_images)
    check_model(args.model)
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Attributes, then prints a table for each picture and where its page is."""
    args = parse_arguments(argv)
    # Here: they import torch and diffusers, which takes seconds.
    from ..front import attribute
    from ..storage.records import NAMES, name_input
    from .flags import check_names

    check_names(args)
    NAMES.clear()
    name_input("model", " with ".join([args.model, *args.lora, *args.textual_inversion]))
    name_input("data root", str(Path(args.out) / "root"))
    words = sys.argv[1:] if argv is None else argv
    answers = attribute(
        **vars(args), command=shlex.join(["python", "-m", "unlearn", "attribute", *words])
    )
    for answer in answers:
        answer.show(args.top_k)
    if len(answers) > 1:
        if together := answers[0].together:
            together.show()
        show("", f"All: {answers[0].index}")
