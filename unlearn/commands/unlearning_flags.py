"""Flags of unlearning and of its scoring: added, checked, and made settings."""

from argparse import Namespace
from dataclasses import fields

from ..attribution.names import OUTPUT, REMOVAL
from ..attribution.scoring import SCORINGS
from ..attribution.settings import AUDIT, AUTOCAST, SHORTLIST, UnlearnSettings
from ..datasets.settings import AUTO_CHANGE
from ..errors import UserError
from ..models.pipelines import SELECTIONS
from .advice import index_command
from .flags import Parser, step_size
from .parsing import add_box


def add_unlearning_flags(parser: Parser) -> None:
    """Adds the flags of the Newton steps."""
    own = "dataset.json's, of AbC"
    parser.add(
        "unlearning", "--fisher_path", help="diagonal Fisher (default sd_fisher.* of the data root)"
    )
    parser.add(
        "unlearning",
        "--weight_selection",
        choices=SELECTIONS,
        help="weights that are unlearned (default cross-attn-kv, of a LoRA its own matrices: lora), or "
        "whose derivatives removal takes (default all)",
    )
    parser.add(
        "unlearning",
        "--damping",
        type=float,
        help="added to the Fisher, as a multiple of each parameter's mean entry (default "
        f"{own} 0, else 0.1)",
    )
    parser.add(
        "unlearning",
        "--num_train",
        type=int,
        help="N of the Newton update: images the model was trained on (default "
        f"{own} 400,000,000, else all training images of the data root)",
    )
    parser.add(
        "unlearning",
        "--unlearn_lr",
        type=step_size,
        help="alpha of the Newton update, or auto: one step, scaled so that the selected weights "
        f"move by {100 * AUTO_CHANGE:g} %%, in relative norm (default {own} 0.1, else auto)",
    )
    parser.add(
        "unlearning",
        "--unlearn_steps",
        type=int,
        help=f"Newton steps (default {own} 100, else 1)",
    )
    parser.add(
        "unlearning",
        "--unlearn_batch_size",
        type=int,
        help="noise draws of a Newton step: this number times the next (default dataset.json's, "
        "else 16)",
    )
    parser.add(
        "unlearning",
        "--unlearn_grad_accum_steps",
        type=int,
        help="... times this one; only --compat abu tells the two apart (default dataset.json's, "
        "else 10)",
    )
    parser.add(
        "unlearning",
        "--seed",
        type=int,
        default=0,
        help="seed of unlearning's noise and timesteps (default 0)",
    )


def add_scoring_flags(parser: Parser) -> None:
    """Adds the flags of scoring, of what is shown, and of passes and their precision."""
    parser.add(
        "scoring",
        "--scoring",
        choices=[*SCORINGS, REMOVAL],
        default="exact",
        help="exact: difference of two losses (default); output: how far the model's predictions of an "
        "image move, without losses; midpoint: derivative half way along the weight change; gradient: "
        "first and second order, all queries of a model at once; removal: how much less certain the "
        "query's prediction would be without an image",
    )
    add_box(parser)
    parser.add(
        "scoring",
        "--loss_time_samples",
        type=int,
        help="timesteps of the loss's grid, as in compute_training_loss.py (default "
        "dataset.json's, else 10)",
    )
    parser.add(
        "scoring",
        "--index",
        help="folder of indices: rank all images from the model's, score only the best of them",
    )
    parser.add(
        "scoring",
        "--shortlist",
        type=int,
        help=f"with --index: how many of the best (default {SHORTLIST})",
    )
    parser.add(
        "scoring",
        "--audit",
        type=int,
        help=f"with --index: how many others, at random, to tell what it misses (default {AUDIT})",
    )
    parser.add(
        "output", "--top_k", type=int, help="images in the table and the picture (default 10)"
    )
    parser.add(
        "running",
        "--precision",
        choices=AUTOCAST,
        help="fp32 (default), tf32, or bf16, which exact scoring does not survive",
    )
    parser.add(
        "running",
        "--loss_batch_size",
        type=int,
        help="noisy samples in one pass of scoring or unlearning; memory only (default "
        "dataset.json's, else 200)",
    )


def check_scoring(args: Namespace) -> None:
    """Raises UserError where a way of unlearning's scoring does not go with the other flags."""
    if args.scoring == REMOVAL:
        return
    given = [f"--{flag}" for flag in ("shortlist", "audit") if getattr(args, flag) is not None]
    if given and not args.index:
        raise UserError(
            f"{given[0]}: means nothing without --index; build one: {index_command(args)} and give "
            f"--index results/index"
        )
    if args.index and (args.scoring == "gradient" or args.compat):
        raise UserError(
            "--index: ranks all images by their gradients already; score its shortlist with "
            "--scoring exact or midpoint, without --compat"
        )
    differences = {"exact": "two losses", OUTPUT: "two predictions"}
    if args.scoring in differences and args.precision == "bf16":
        raise UserError(
            f"--precision bf16: the difference of {differences[args.scoring]} is lost in its "
            f"rounding; give --scoring midpoint or gradient"
        )
    if args.index and args.scoring == OUTPUT:
        raise UserError(
            f"--index: estimates changes of losses, beside which those of predictions cannot stand; "
            f"give --scoring exact or midpoint, found {args.scoring}"
        )
    if args.scoring != "exact" and args.compat:
        raise UserError(
            f"--compat {args.compat}: the published program knows --scoring exact only, found "
            f"{args.scoring}"
        )
    is_derivative = args.scoring not in differences
    if (is_derivative or args.index) and args.weight_selection != "cross-attn-kv":
        raise UserError(
            f"{'--index' if args.index else f'--scoring {args.scoring}'}: takes the derivative "
            f"through keys and values; give --weight_selection cross-attn-kv, found "
            f"{args.weight_selection}, or --scoring exact or {OUTPUT}"
        )


def unlearn_settings(args: Namespace) -> UnlearnSettings:
    """How the queries are unlearned: the fields are flags of the same names."""
    names = [field.name for field in fields(UnlearnSettings)]
    return UnlearnSettings(**{name: getattr(args, name) for name in names})
