"""Claims: files that say which process works on what, so that any number of them share work without
talking to each other.

A claim is made by exclusive creation and removed when its work is done. Its owner's heart beats in
it: the file's time changes every BEAT seconds. It is abandoned where its owner's process is gone
from this host, or where it has not changed for EXPIRY seconds of the *observer's* clock: what other
hosts' clocks say never counts. Claims save work and protect nothing: two processes at the same
piece (one was believed dead, a file system was slow) write the same bytes, whole or not at all.
"""

import errno
import json
import os
import threading
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

from ..errors import UserError
from .artifacts import open_plain, this_machine

BEAT, EXPIRY = 10, 90  # seconds; an NFS client may show a file's time of a minute ago


@cache
def start_of(pid: int) -> str | None:
    """When a process of this host started, in ticks since its boot, so that a number given anew is
    another process; None where that is not known (no /proc)."""
    with suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return None


def describe_owner() -> dict:
    """What a claim of this process says; the time is for people."""
    return {
        "host": this_machine(),
        "pid": os.getpid(),
        "started": start_of(os.getpid()),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def read_claim(path: Path) -> tuple[dict, tuple[int, int]] | None:
    """(its owner or {}, what changes when its heart beats), or None where there is no such
    claim."""
    try:
        # Opened, not only asked for: on NFS that brings the newest time. Another's link or pipe is
        # not followed or waited for.
        with open(path, "rb", opener=open_plain) as file:
            status = os.fstat(file.fileno())
            owner = json.loads(file.read(1000))
    except FileNotFoundError:
        return None
    except (
        ValueError,
        OSError,
    ):  # its owner died between making and writing it, or nobody may read it
        owner = {}
        try:
            status = os.lstat(path)
        except OSError:  # its owner is done with it
            return None
    return (owner if isinstance(owner, dict) else {}), (status.st_ino, status.st_mtime_ns)


def is_dead(owner: dict) -> bool:
    """Whether a claim's owner is known to be gone: a process of this host that is not there, or
    another one by now."""
    if owner.get("host") != this_machine() or not isinstance(owner.get("pid"), int):
        return False
    try:
        os.kill(owner["pid"], 0)  # signal 0 only asks whether the process is there
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:
        pass  # it is there, another user's
    return start_of.__wrapped__(owner["pid"]) != owner.get("started")


class Heart:
    """Beats in all claims that this process holds, in a thread of its own; it ends with the last of
    them."""

    def __init__(self) -> None:
        self.lock, self.held, self.thread = threading.Lock(), set(), None

    def hold(self, path: Path) -> None:
        """Begins to beat in a claim."""
        with self.lock:
            self.held.add(path)
            if not (
                self.thread and self.thread.is_alive()
            ):  # a fork has the claims' set, and no thread
                self.thread = threading.Thread(target=self.beat, daemon=True)
                self.thread.start()

    def drop(self, path: Path) -> None:
        """Removes a claim."""
        with self.lock:
            self.held.discard(path)
            with suppress(OSError):  # no permission any more: it will expire
                path.unlink(missing_ok=True)

    def beat(self) -> None:
        """What the thread does."""
        while True:
            time.sleep(BEAT)
            with self.lock:
                for path in self.held:
                    with suppress(
                        OSError
                    ):  # taken over, its folder gone: that must not end the heart
                        os.utime(path)
                if not self.held:
                    self.thread = None
                    return


HEART = Heart()


def create_claim(path: Path) -> bool:
    """Whether a claim was made: exclusive creation, which the file system gives to one process
    alone. Raises UserError where it cannot be made."""
    try:
        file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    except (FileExistsError, FileNotFoundError):  # another's; or the folder is gone, with the work
        return False
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from error
    try:
        os.write(file, json.dumps(describe_owner()).encode())
    except OSError as error:
        path.unlink(missing_ok=True)
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise UserError(
            f"{path}: "
            f"{'the disk is full; free some space and run the same command again' if full else error.strerror}"
        ) from error
    finally:
        os.close(file)
    return True
