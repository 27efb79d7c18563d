"""Which training images made this picture? Data attribution for text-to-image models by unlearning
synthesized images. The Python interface is described in `unlearn/api` and, where one call is to
do everything, `unlearn/front`."""

import os
from typing import TYPE_CHECKING

from .errors import UserError
from .version import __version__

if TYPE_CHECKING:
    from .api import (
        ChosenSet,
        Delta,
        DiagonalFisher,
        Model,
        Ranking,
        RemovalSettings,
        TrainingSet,
        choose_set,
        compute_losses,
        compute_output_changes,
        customized,
        encode_query,
        load_fisher,
        load_model,
        open_training_set,
        rank,
        removal_group_scores,
        removal_scores,
        unlearn,
    )
    from .front import Attribution, attribute

__all__ = [
    "Attribution",
    "ChosenSet",
    "Delta",
    "DiagonalFisher",
    "Model",
    "Ranking",
    "RemovalSettings",
    "TrainingSet",
    "UserError",
    "__version__",
    "attribute",
    "choose_set",
    "compute_losses",
    "compute_output_changes",
    "customized",
    "encode_query",
    "load_fisher",
    "load_model",
    "open_training_set",
    "rank",
    "removal_group_scores",
    "removal_scores",
    "unlearn",
]


# Read by transformers at its first import: without torchvision, which nothing here uses, it warns of
# it at the start of every run.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def __getattr__(name: str):
    """Public names are imported when they are first used: torch and diffusers take seconds."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import api, front

    return getattr(front if name in front.__all__ else api, name)


def __dir__() -> list[str]:
    return sorted(__all__)
