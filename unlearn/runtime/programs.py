"""Device, precision, progress, and how a script ends."""

import ctypes
import errno
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import TypeVar

import torch
from tqdm import tqdm

from ..errors import UserError
from .printing import LineFormatter, make_streams_safe, printable
from .signals import STOP, Stopped, finishing

log = logging.getLogger("unlearn")
Item = TypeVar("Item")
Result = TypeVar("Result")
SECONDS_BETWEEN_LINES, SECONDS_BETWEEN_LOOKS = 30, 0.5
# Faults that no program can prevent, of disks and of names that it was given.
OF_DISKS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.EIO,
    errno.ESTALE,
)
OF_NAMES = errno.ENAMETOOLONG, errno.ELOOP
OUT_OF_MEMORY = (
    "can't allocate memory",
    "out of memory",
    "ALLOC_FAILED",
)  # in errors that have no type of their own


def choose_device(name: str | None = None) -> torch.device:
    """The device asked for; cuda if there is one where none was, each launched process its own.
    Raises UserError where it cannot be had."""
    if name is None:
        if not torch.cuda.is_available():
            return torch.device("cpu")
        # More processes than devices share them, and one device is each's own wherever SLURM shows
        # a task no other.
        name = f"cuda:{local_rank() % torch.cuda.device_count()}"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: expected cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: expected cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices; try "
            f"--device cpu"
        )
    return device


def read_number(variable: str) -> int | None:
    """The whole number in an environment variable, None where it is not set: or empty, as
    `VARIABLE=` leaves it. Raises UserError where it is something else."""
    if not (text := os.environ.get(variable, "").strip()):
        return None
    if not re.fullmatch(r"\d{1,9}", text):
        raise UserError(
            f"the environment variable {variable}: expected a whole number, as launchers set it, "
            f"found {text!a:.40}; unset {variable}"
        )
    return int(text)


def local_rank() -> int:
    """The number of this process among those of its machine: the launcher's, else that of a task
    that srun started."""
    return next(
        (rank for rank in map(read_number, ("LOCAL_RANK", "SLURM_LOCALID")) if rank is not None), 0
    )


def process_share() -> tuple[int, int]:
    """(index, number) of this process among those that `accelerate launch`, torchrun or srun
    started, by the variables that these set; (0, 1) without them. No process group is made: nobody
    waits for another, dead or alive. Raises UserError where they are no such numbers."""
    names = ("RANK", "WORLD_SIZE")
    if None in [read_number(name) for name in names]:
        names = (
            "SLURM_PROCID",
            "SLURM_STEP_NUM_TASKS" if read_number("SLURM_STEP_NUM_TASKS") else "SLURM_NTASKS",
        )
        # Task 0 is alone in a batch script and in a shell of `srun --pty` or `salloc`, however many
        # tasks the job may start.
        if not read_number("SLURM_PROCID") and (
            names[1] == "SLURM_NTASKS" or os.environ.get("SLURM_PTY_PORT")
        ):
            return 0, 1
    index, number = read_number(names[0]) or 0, read_number(names[1]) or 1
    if index >= number:
        raise UserError(
            f"the environment variable {names[0]}: expected at most {number - 1}, as {names[1]} "
            f"is {number}, found {index}"
        )
    return index, number


def part_of(items: Iterable[Item], shard: str | None) -> list[Item]:
    """Those of some items that `--shard I/N` names: the I-th of N parts, runs of nearly equal
    length; all of them without it. Raises UserError where it is no such thing."""
    if shard is None:
        return list(items)
    found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", shard)
    index, number = map(int, found.groups()) if found else (0, 0)
    if not 1 <= index <= number:
        raise UserError(f"--shard {shard}: expected I/N, the I-th of N parts, such as 1/4")
    items = list(items)
    part = items[len(items) * (index - 1) // number : len(items) * index // number]
    if not part:
        log.info(f"--shard {shard}: nothing to do; there are only {len(items)} for {number} parts")
    return part


def set_precision(precision: str) -> None:
    """fp32: TensorFloat-32 off in matrix products and convolutions. tf32 and bf16 (which is
    autocast's to use): on in both. On CUDA, deterministic kernels in each, and never cuDNN's
    attention."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = os.environ.get("CUBLAS_WORKSPACE_CONFIG") or ":4096:8"
    if torch.cuda.is_available():
        torch.use_deterministic_algorithms(True, warn_only=True)
        # torch sets this property of the module when it is imported
        torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision in (
        "tf32",
        "bf16",
    )
    torch.backends.cudnn.deterministic = True
    # cuDNN's attention reads beyond its inputs in the backward pass: with torch 2.11 on an H100 the
    # gradients of FLUX in bfloat16 were numbers of other tensors (tests/test_gpu.py).
    torch.backends.cuda.enable_cudnn_sdp(False)


@contextmanager
def in_precision(precision: str) -> Iterator[None]:
    """`set_precision` for a while."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    set_precision(precision)
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def run_within_memory(
    work: Callable[[int], Result],
    size: int,
    unit: str,
    save_memory: Callable[[], bool] = lambda: False,
) -> tuple[Result, int]:
    """`work(size)`, and the size it took: where the device's memory is full, `size` is halved until
    it fits, and at last memory is saved; save_memory(): False where that cannot be done."""
    while True:
        try:
            return work(size), size
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            saved = size == 1 and save_memory()
            if size == 1 and not saved:
                raise
        size = max(1, size // 2)
        torch.cuda.empty_cache()
        how = (
            "gradients computed in parts (checkpointing)" if saved else f"{size} {unit} in one pass"
        )
        log.warning(f"out of memory: going on with {how}")


def tune_allocator(
    mmap_threshold: int = 1 << 30, trim_threshold: int = 2**31 - 1, top_pad: int = 64 << 20
) -> None:
    """Keeps freed memory for the next tensor instead of handing it back to the system and asking
    anew, page by page, which costs a CPU a tenth of a small model's time (glibc only; elsewhere it
    does nothing). Arguments in bytes, as mallopt(3)."""
    set_option = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if set_option:
        for option, value in (-3, mmap_threshold), (-1, trim_threshold), (-2, top_pad):
            set_option(option, value)


def run_ahead(
    items: Iterable[Item],
    prepare: Callable[[Item], Result],
    work: Callable[[Item, Result], object],
    device: torch.device | str,
) -> None:
    """`work(item, prepare(item))` of every item; what comes next is prepared meanwhile.

    On a CPU as many items are worked on at once as torch has threads, each by one of them: faster
    than one item by all wherever a model is small. An item's result does not depend on it. Items
    are taken one by one, as threads become free: they may be a `sharing.Share`, whose stop() is
    called where it ends early. Raises Stopped where a signal ended it.
    """
    num_threads = torch.get_num_threads()
    num_workers = num_threads if torch.device(device).type == "cpu" else 1
    if torch.device(device).type == "cpu":
        tune_allocator()
    turns = threading.Semaphore(num_workers)
    lock = threading.Lock()
    ended = threading.Event()
    source = iter(items)

    def run_some():
        while not ended.is_set():
            try:
                with lock:
                    item = next(source)
            except StopIteration:
                return
            prepared = prepare(item)
            with turns:
                if not ended.is_set():
                    work(item, prepared)

    # One thread more than turns: it prepares.
    pool = ThreadPoolExecutor(
        num_workers + 1, initializer=torch.set_num_threads, initargs=(num_threads // num_workers,)
    )
    try:
        with finishing() as stopping:
            with pool:
                everything = running = {pool.submit(run_some) for _ in range(num_workers + 1)}
                try:
                    while running and not stopping.is_set():
                        done, running = wait(running, SECONDS_BETWEEN_LOOKS, FIRST_EXCEPTION)
                        for future in done:
                            future.result()
                finally:  # what is being worked on is finished, what is only prepared is not begun
                    ended.set()
                    getattr(source, "stop", lambda: None)()
            for future in everything:  # what was finished last may have failed too
                future.result()
    finally:
        torch.set_num_threads(num_threads)


def say(text: str) -> None:
    """Logs what one line is enough for, however many processes a launcher started."""
    if process_share()[0] == 0:
        log.info(text)


AFTERWARDS = [0.0]  # seconds that a run will take once what is at hand is done


@contextmanager
def followed_by(seconds: float) -> Iterator[None]:
    """Within it progress tells the time left in all: its own and what comes after."""
    AFTERWARDS.append(seconds)
    try:
        yield
    finally:
        AFTERWARDS.pop()


def progress(total: int, description: str, unit: str, done: int = 0) -> "tqdm | LineProgress":
    """A counter with `update(count)`: a bar with rate and time left on a terminal, log lines
    elsewhere (SLURM)."""
    description = printable(description)
    if sys.stderr.isatty():
        later = f"then {AFTERWARDS[-1]:.0f} s" if AFTERWARDS[-1] >= 1 else None
        return tqdm(
            total=total,
            initial=done,
            desc=description,
            unit=unit,
            dynamic_ncols=True,
            postfix=later,
        )
    return LineProgress(total, description, unit, done)


class LineProgress:
    """Progress as log lines, one every 30 seconds and one at the end."""

    def __init__(self, total: int, description: str, unit: str, done: int = 0) -> None:
        self.total = total
        self.description = description
        self.unit = unit
        self.count = done
        self.start_count = done
        self.start = self.printed = time.monotonic()

    def __enter__(self) -> "LineProgress":
        return self

    def __exit__(self, *error) -> None:
        if error[0] is None:
            self.print()

    def update(self, count: int = 1) -> None:
        """Counts `count` more units done."""
        self.count += count
        if time.monotonic() - self.printed > SECONDS_BETWEEN_LINES:
            self.print()

    def print(self) -> None:
        """Logs what is done, the rate and the time left."""
        self.printed = time.monotonic()
        rate = (self.count - self.start_count) / max(self.printed - self.start, 1e-9)
        left = ""
        if rate and self.count < self.total:
            seconds = (self.total - self.count) / rate
            left = f", {seconds:.0f} s left"
            if AFTERWARDS[-1] >= 1:
                left += f", {seconds + AFTERWARDS[-1]:.0f} s in all"
        log.info(
            f"{self.description}: {self.count}/{self.total} {self.unit} ({rate:.1f} "
            f"{self.unit}/s{left})"
        )


def run(main: Callable[[Sequence[str] | None], object], argv: Sequence[str] | None = None) -> None:
    """Runs `main(argv)` as a script: a UserError or a full memory ends with one line and status 2,
    a signal that schedulers send before they kill with one line and status 75, "try again"."""
    make_streams_safe()
    try:
        asks_for_help = {"-h", "--help"} & set(sys.argv[1:] if argv is None else argv)
        index, number = (0, 1) if asks_for_help else process_share()
        who = f"[{index + 1}/{number}] " if number > 1 else ""
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(LineFormatter(f"%(asctime)s {who}%(message)s", "%H:%M:%S"))
        logging.basicConfig(level=logging.INFO, handlers=[handler])
        STOP.install()
        logging.getLogger("httpx").setLevel(logging.WARNING)
        main(argv)
    except UserError as error:
        sys.exit(end_with(error))
    except OSError as error:
        if error.errno not in (*OF_NAMES, *OF_DISKS):
            raise
        name = f"{error.filename!s:.200}: " if error.filename else ""
        remedy = "see to the disk or its permissions, and run the same command again"
        sys.exit(
            end_with(f"{name}{error.strerror}" + (f"; {remedy}" if error.errno in OF_DISKS else ""))
        )
    except (
        RuntimeError,
        MemoryError,
    ) as error:  # torch's own out-of-memory error is a RuntimeError
        if not is_out_of_memory(error):
            raise
        sys.exit(
            end_with(
                "out of memory: run the same command with a smaller --batch_size, "
                "--loss_batch_size, --vae_batch_size or --stack "
                "(finished work is kept)"
            )
        )
    except Stopped as stopped:
        print(f"stopped by {stopped}; run the same command again to go on", file=sys.stderr)
        sys.exit(os.EX_TEMPFAIL)
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        sys.exit(130)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory of device or host is full."""
    return (
        isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError))
        or isinstance(error, RuntimeError)
        and any(text in str(error) for text in OUT_OF_MEMORY)
    )


def end_with(message: object) -> int:
    """Prints a user's error as one line; returns the exit status 2."""
    print(f"error: {printable(' '.join(str(message).split()))}", file=sys.stderr)
    return 2
