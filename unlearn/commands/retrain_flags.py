"""Flags of training again: which models, by what recipe, and how queries are measured under them."""

from ..models.families.interface import UNET_TARGETS
from ..retraining.measures import LOSS_TIMESTEPS
from ..retraining.recipes import SCHEDULES
from .flags import Parser


def add_plan_flags(parser: Parser) -> None:
    """Adds the flags that say which models are trained."""
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        default=[0],
        help="seeds of initial weights and batches (default 0; several: full only). "
        "Losses are compared within a seed: first train its full model; pictures with the seed "
        "that made the queries alone",
    )
    parser.add_argument(
        "--count", type=int, default=1, help="subsets, random: how many models (of each K)"
    )
    parser.add_argument(
        "--first", type=int, default=0, help="subsets, random: number of the first one (default 0)"
    )
    parser.add_argument(
        "--fraction", type=float, default=0.5, help="subsets: images kept (default 0.5)"
    )
    parser.add_argument(
        "--top_k", type=int, nargs="+", default=[], help="random, without: images left out"
    )
    parser.add_argument(
        "--sets_json",
        metavar="FILE",
        help='sets: {"name": ["image", ...]}, the images left out, named as in influence.csv',
    )
    parser.add_argument(
        "--influence",
        nargs="+",
        default=[],
        metavar="DIR",
        help="without: RESULT_DIR/influence, RESULT_DIR/baselines/METHOD, ...",
    )
    parser.add_argument(
        "--chosen_sets",
        action="store_true",
        help="with --influence of removal: the images that are chosen together, not the first of the "
        "ranking",
    )
    parser.add_argument(
        "--scores",
        metavar="DIR",
        help="without: rankings by the score files that `evaluate` wrote",
    )
    parser.add_argument(
        "--methods", nargs="+", default=[], help="with --scores: only these (default all there)"
    )
    parser.add_argument("--num_queries", type=int, help="without: the first so many queries only")
    parser.add_argument(
        "--together",
        type=int,
        default=1,
        metavar="Q",
        help="without: the top K of Q queries, in their order, leave at once, so that one model "
        "serves Q (default 1); more images are gone than a query's own",
    )


def add_recipe_flags(parser: Parser) -> None:
    """Adds the flags of how models are trained; what is not given is the data root's."""
    parser.add_argument("--train_epochs", type=int, help="passes over the training set")
    parser.add_argument("--train_lr", type=float, help="learning rate of AdamW")
    parser.add_argument("--train_batch_size", type=int, help="images a step")
    parser.add_argument("--train_schedule", choices=SCHEDULES, help="of the learning rate")
    parser.add_argument(
        "--train_lora_rank",
        type=int,
        help="trains a LoRA of this rank on the model as it is, not the model (default 0: no LoRA)",
    )
    parser.add_argument(
        "--train_lora_alpha", type=float, help="its alpha, a factor alpha / rank (default the rank)"
    )
    parser.add_argument(
        "--train_lora_targets",
        choices=UNET_TARGETS,
        help="layers that it changes (default attention)",
    )
    parser.add_argument(
        "--mixed_precision", choices=("no", "bf16"), default="no", help="of training (default no)"
    )


def add_measure_flags(parser: Parser) -> None:
    """Adds the flags of how queries are measured under models."""
    parser.add_argument(
        "--loss_time_samples",
        type=int,
        default=LOSS_TIMESTEPS,
        help=f"timesteps of the queries' losses (default {LOSS_TIMESTEPS})",
    )
    parser.add_argument(
        "--loss_batch_size", type=int, help="noisy samples in one forward pass; memory only"
    )
    parser.add_argument(
        "--features",
        metavar="MODEL_NAME",
        help="CLIP or DINO model that pictures are compared by (default: VAE latents)",
    )
    parser.add_argument("--no_pictures", action="store_true", help="measure losses only")
