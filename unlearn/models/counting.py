"""What a piece of work costs, counted: floating-point operations, and bytes that are alive at once.

Both count on tensors of the device `meta` too, which have shapes and no numbers: what a model costs
is known before its weights are there.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import (
    FlopCounterMode,
    conv_backward_flop,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
CONVOLVED_BACK = torch.ops.aten.convolution_backward
FUSED_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def count_flops(work: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products and convolutions of one call of `work`, its
    backward passes too. Attention is taken apart into its products for that: not every fused kernel
    of it is known to the counter."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        work()
    return counter.get_total_flops()


class Counts:
    """What `counting` has counted so far."""

    def __init__(self, flops: FlopCounterMode, live: "LiveBytes") -> None:
        self.counter, self.live = flops, live

    @property
    def flops(self) -> int:
        """Operations, as of `count_flops`; a backward pass of fused attention makes its scores anew."""
        return self.counter.get_total_flops()

    @property
    def peak(self) -> int:
        """Most bytes of tensors that were alive at once, what autograd keeps among them. What
        kernels take besides is not known, nor what an allocator wastes."""
        return self.live.peak


@contextmanager
def counting(held: Iterable[torch.Tensor] = (), operations: bool = True) -> Iterator[Counts]:
    """Counts what is done within it; attention is fused, as it is on every device. held: tensors that
    were there before, such as weights, which do not count; operations: whether these are counted
    too, by what would keep what gradient checkpointing does not."""
    live = LiveBytes(held)
    attention = {FUSED: of_attention, FUSED.default: of_attention}
    backward = {FUSED_BACKWARD: of_backward, FUSED_BACKWARD.default: of_backward}
    convolved = {CONVOLVED_BACK: of_convolution, CONVOLVED_BACK.default: of_convolution}
    known = {**attention, **backward, **convolved}
    counter: Any = FlopCounterMode(display=False, custom_mapping=known)
    counter.mod_tracker = Everywhere()
    with live, counter if operations else nullcontext(), fused_attention():
        yield Counts(counter, live)


class Everywhere:
    """In place of what tells the counter in which module an operation is: its hooks do not take a
    parameter that is handed from one module to another, as Sana's is."""

    parents = ("Global",)

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        pass


def of_attention(
    query: torch.Size, key: torch.Size, value: torch.Size, *more: Any, **other: Any
) -> int:
    """Operations of fused attention, from the shapes of its inputs."""
    return sdpa_flop_count(query, key, value)


def of_backward(
    gradient: torch.Size,
    query: torch.Size,
    key: torch.Size,
    value: torch.Size,
    *more: Any,
    **other: Any,
) -> int:
    """Operations of the backward pass of fused attention, from the shapes of its inputs."""
    return sdpa_backward_flop_count(gradient, query, key, value)


def of_convolution(*given: Any, out_shape: Any, **other: Any) -> int:
    """Operations of a convolution's backward pass, from shapes: torch's own counter takes one in
    groups for one without them where it comes to the weights."""
    *shapes, groups, (is_input, is_weight, _) = given
    count: Any = conv_backward_flop
    own = count(*shapes, groups, (is_input, False, False), out_val=out_shape)
    weights = count(*shapes, groups, (False, is_weight, False), out_val=out_shape)
    return own + weights // groups


@contextmanager
def fused_attention() -> Iterator[None]:
    """Attention that never has a matrix of all pairs of positions, on `meta` too, which by itself
    would take another one than devices do. In every thread: autograd has its own."""
    functional: Any = torch.nn.functional
    before = functional.scaled_dot_product_attention

    def attend(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        **more: Any,
    ) -> torch.Tensor:
        how = dropout_p, is_causal
        if attn_mask is not None and attn_mask.dtype == torch.bool:  # as every device does
            there = torch.zeros_like(attn_mask, dtype=query.dtype)
            attn_mask = there.masked_fill_(~attn_mask, -torch.inf)
        return FUSED(query, key, value, *how, attn_mask=attn_mask, scale=scale)[0]

    functional.scaled_dot_product_attention = attend
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = before


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operations made and that are still alive, `live`, and the most of
    them at once, `peak`."""

    def __init__(self, held: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.held = [tensor.untyped_storage() for tensor in held]  # else their numbers could return
        self.known = {storage._cdata for storage in self.held}

    def __torch_dispatch__(self, func, types, given=(), named=None):
        outputs = func(*given, **(named or {}))
        for output in tree_leaves(outputs):
            if isinstance(output, torch.Tensor):
                self.add(output.untyped_storage())
        return outputs

    def add(self, storage: torch.UntypedStorage) -> None:
        """Counts a storage that is not known, until it is gone."""
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self.drop, key, size)

    def drop(self, key: int, size: int) -> None:
        """Counts a storage that is gone."""
        self.known.discard(key)
        self.live -= size
