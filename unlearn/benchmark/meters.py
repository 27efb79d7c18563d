"""What a piece of work costs: seconds, peak memory, floating-point operations, and the machine's
own ceiling."""

import ctypes
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..models.counting import count_flops

__all__ = ["anonymous_bytes", "count_flops", "hand_back_memory", "measure_ceiling", "metered"]

SECONDS_BETWEEN_SAMPLES = 0.01  # of the process's memory
CEILING_SECONDS = 2.0
CEILING_SIZES = {
    "cpu": 2048,
    "cuda": 8192,
}  # rows and columns of the matrices whose product is the ceiling
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16}


def anonymous_bytes() -> int | None:
    """Anonymous resident memory of this process, which no memory-mapped file is part of; None where
    the system does not tell (it is Linux's)."""
    try:
        found = re.search(
            r"^RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE
        )
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def hand_back_memory() -> None:
    """Gives the system what was freed but kept for later, so that one measurement's peak is not the
    one before's (glibc only)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)


def synchronise(device: torch.device) -> None:
    """Waits until a device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def metered(device: torch.device) -> Iterator[dict[str, Any]]:
    """Yields a dictionary; at the end it holds `seconds`, `host_bytes` (peak of anonymous memory,
    the whole process's; None where it cannot be told) and `device_bytes` (peak of allocated CUDA
    memory; None on a CPU)."""
    hand_back_memory()
    costs: dict[str, Any] = {"device_bytes": None}
    peak, done = anonymous_bytes(), threading.Event()

    def sample():
        nonlocal peak
        while not done.wait(SECONDS_BETWEEN_SAMPLES):
            peak = max(peak or 0, anonymous_bytes() or 0)

    watcher = threading.Thread(target=sample, daemon=True)
    if peak is not None:
        watcher.start()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    synchronise(device)
    start = time.perf_counter()
    try:
        yield costs
        synchronise(device)
        costs["seconds"] = time.perf_counter() - start
        if device.type == "cuda":
            costs["device_bytes"] = torch.cuda.max_memory_allocated(device)
    finally:
        done.set()
        if peak is not None:
            watcher.join()
    costs["host_bytes"] = peak


def measure_ceiling(
    device: torch.device, precision: str, size: int | None = None, seconds: float = CEILING_SECONDS
) -> float:
    """Floating-point operations a second of a large matrix product, the best of many, on a device
    with all of torch's threads. precision: fp32, tf32 or bf16; the flags of the first two are the
    caller's to set."""
    size = size or CEILING_SIZES[device.type]
    generator = torch.Generator(device).manual_seed(0)
    first, second = (
        torch.randn(size, size, device=device, generator=generator).to(DTYPES[precision])
        for _ in range(2)
    )
    shortest, start = float("inf"), time.perf_counter()
    while time.perf_counter() - start < seconds or shortest == float("inf"):
        synchronise(device)
        begin = time.perf_counter()
        torch.mm(first, second)
        synchronise(device)
        shortest = min(shortest, time.perf_counter() - begin)
    return 2 * size**3 / shortest
