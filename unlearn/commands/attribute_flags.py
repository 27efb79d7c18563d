"""The flags of `python -m unlearn attribute`."""

from ..attribution.names import FRONT_SCORINGS
from ..models.sampling import GUIDANCE, NUM_INFERENCE_STEPS
from .parsing import Parser, add_box


def add_pictures(parser: Parser) -> None:
    """The pictures that are asked about, or what makes one."""
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


def add_images(parser: Parser) -> None:
    """The training images, with their captions."""
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


def add_model(parser: Parser) -> None:
    """What made the pictures."""
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


def add_scoring(parser: Parser) -> None:
    """How images are scored."""
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
