"""Which of a denoiser's weights are unlearned, differentiated or fitted, by the name of a selection."""

import re

import torch

from ..errors import UserError
from . import lora
from .families import find_denoiser_family
from .families.interface import UNET_SELECTIONS

SELECTIONS = (*UNET_SELECTIONS, lora.SELECTION)  # of every family


def select_parameters(
    denoiser: torch.nn.Module, selection: str, with_unread: bool = False
) -> dict[str, torch.nn.Parameter]:
    """The parameters of a selection, by name in the model's order. with_unread: those too on which no
    prediction depends; their derivatives are zero, or what rounding leaves of zero, which no
    curvature may divide. Raises UserError where none matches, or a LoRA stands beside the weights."""
    lora.check_selection(denoiser, selection)
    family = find_denoiser_family(denoiser)
    if selection == lora.SELECTION:
        selected = lora.select_matrices(denoiser)
    else:
        pattern = family.selections[selection]
        parameters = denoiser.named_parameters()
        selected = {name: value for name, value in parameters if re.search(pattern, name)}
    unread = family.unread(denoiser)
    if unread is not None and not with_unread:
        selected = {name: value for name, value in selected.items() if not re.search(unread, name)}
    if not selected:
        raise UserError(
            f"--weight_selection {selection}: matches no parameter of {type(denoiser).__name__}"
        )
    return selected


def list_unread(denoiser: torch.nn.Module, selection: str) -> list[str]:
    """Names of the parameters that a selection leaves out, because no prediction depends on them."""
    every = select_parameters(denoiser, selection, with_unread=True)
    return sorted(every.keys() - select_parameters(denoiser, selection).keys())
