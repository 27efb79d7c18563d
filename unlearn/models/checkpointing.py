"""Gradient checkpointing: a backward pass computes a block's inner results again instead of having
kept them. Less memory, one forward pass more, the same numbers."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from .text_weights import THREAD, Watched


def checkpoint_gradients(denoiser: Any) -> bool:
    """Turns it on for a denoiser, in place; False where it is on already, or cannot be."""
    if not denoiser._supports_gradient_checkpointing or denoiser.is_gradient_checkpointing:
        return False
    denoiser.enable_gradient_checkpointing(call_again)
    return True


@contextmanager
def keeping_everything(denoiser: Any) -> Iterator[None]:
    """Within it a denoiser keeps all that gradients need, in place. Where its weights are lent for a
    call, as in training, what is computed again later would be so with weights of its own."""
    was_on = getattr(denoiser, "is_gradient_checkpointing", False)
    if was_on:
        denoiser.disable_gradient_checkpointing()
    try:
        yield
    finally:
        if was_on:
            denoiser.enable_gradient_checkpointing(call_again)


class AsBefore:
    """Within it this thread watches and changes as the one that makes it did then. It may be entered
    again and again: each of several backward passes through one graph computes again."""

    def __init__(self) -> None:
        watched = getattr(THREAD, "watched", None)
        # Who watches has seen it the first time.
        self.own = Watched(None) if watched else None, getattr(THREAD, "change", None)

    def __enter__(self) -> None:
        self.others = getattr(THREAD, "watched", None), getattr(THREAD, "change", None)
        THREAD.watched, THREAD.change = self.own

    def __exit__(self, *error: object) -> None:
        THREAD.watched, THREAD.change = self.others


def call_again(block: torch.nn.Module, *inputs: Any) -> Any:
    """What a block gives, without keeping how it came to it. Made again, possibly in a thread of
    autograd's own, it is watched and changed as the first time."""
    as_before = AsBefore()
    return checkpoint(
        block.__call__,
        *inputs,
        use_reentrant=False,
        preserve_rng_state=False,  # nothing is drawn within a pass
        context_fn=lambda: (nullcontext(), as_before),
    )
