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

from ..attribution.names import FRONT_SCORINGS
from ..datasets.presence import check_images, check_model, check_pictures
from ..models.sampling import GUIDANCE, NUM_INFERENCE_STEPS
from ..runtime.printing import show
from .parsing import add_box, make_parser

HIGHEST_TABLE = 1000


def parse_arguments(argv: Sequence[str] | None) -> Namespace:
    """The command line. Raises UserError where what it names is not there."""
    parser = make_parser(__doc__, "python -m unlearn attribute")
    parser.add("data", "pictures", nargs="*", metavar="PICTURE", help="what is asked about")
    parser.add("data", "--prompt", help="of all pictures (default what each file says)")
    parser.add(
        "data", "--seed", type=int, help="of all pictures, for the page; of the one to be made"
    )
    parser.add(
        "data",
        "--steps",
        type=int,
        help=f"of the picture to be made (default {NUM_INFERENCE_STEPS})",
    )
    parser.add(
        "data",
        "--guidance",
        type=float,
        help=f"of the picture to be made; 1: none (default {GUIDANCE})",
    )
    parser.add(
        "data", "--images", required=True, metavar="FOLDER", help="the training images, or hf:NAME"
    )
    parser.add(
        "data",
        "--caption",
        help="of the images that have none, so of all where none has (DreamBooth's instance prompt)",
    )
    parser.add(
        "data",
        "--class_images",
        metavar="FOLDER",
        help="of prior preservation: training images too, ranked with the others",
    )
    parser.add("data", "--class_prompt", help="the caption of the class images that have none")
    parser.add(
        "data",
        "--captions",
        help="which captions count where several disagree: metadata.jsonl, metadata.csv, "
        'captions.txt, .json, .txt, .caption, a file, or "folder"',
    )
    parser.add(
        "data",
        "--groups",
        help='a column of the metadata (artist, licence), or "folder", for the page',
    )
    parser.add(
        "model",
        "--model",
        required=True,
        help="diffusers folder, name on the hub, checkpoint file (.safetensors, .ckpt), data root, "
        "or the folder of a UNet that a training run left or of a customized model",
    )
    parser.add(
        "model",
        "--lora",
        nargs="+",
        default=[],
        metavar="FILE[:WEIGHT]",
        help="LoRA files or folders that change the model (kohya's, PEFT's or diffusers' names); "
        "their own matrices are then unlearned",
    )
    parser.add(
        "model",
        "--textual_inversion",
        nargs="+",
        default=[],
        metavar="FILE[:WORD]",
        help="embeddings of new words (.safetensors); WORD: by which prompt and captions call it",
    )
    parser.add(
        "model",
        "--weights",
        choices=("fp32", "bf16"),
        help="bf16: all weights but those that are unlearned in half precision (default where fp32 "
        "does not fit on the GPU)",
    )
    parser.add(
        "model",
        "--base",
        help="what a UNet's or a customized model's folder or a checkpoint file takes the rest from",
    )
    parser.add(
        "scoring",
        "--scoring",
        choices=FRONT_SCORINGS,
        default=FRONT_SCORINGS[0],
        help="removal: how much less certain the model would be of the picture without an image "
        "(default); exact: how much worse it explains an image once it has unlearned the picture, "
        "as published; output: how far its predictions of an image then move",
    )
    add_box(parser)
    parser.add(
        "scoring",
        "--use_repeats",
        action="store_true",
        help="of removal: an image in a folder 4_x counts as four (default as one, which predicted "
        "retrained models better)",
    )
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
