"""Claims: files that say which process works on what, so that any number of them share work without talking to each other.

A claim is made by exclusive creation and removed when its work is done. Its owner's heart beats in it: the file's time
changes every BEAT seconds. It is abandoned where its owner's process is gone from this host, or where it has not changed for
EXPIRY seconds of the *observer's* clock: what other hosts' clocks say never counts. Claims save work and protect nothing: two
processes at the same piece (one was believed dead, a file system was slow) write the same bytes, whole or not at all.
"""

import errno
import json
import os
import random
import socket
import threading
import time
from collections import deque
from contextlib import suppress
from functools import cache
from pathlib import Path

from . import UserError

BEAT, EXPIRY = 10, 90  # seconds; an NFS client may show a file's time of a minute ago
SHORTEST_WAIT, LONGEST_WAIT = 0.02, 1.0  # seconds between two looks at what others hold


@cache
def start_of(pid):
    """When a process of this host started, in ticks since its boot, so that a number given anew is another process; None
    where that is not known (no /proc)."""
    with suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return None


def describe_owner():
    """What a claim of this process says; the time is for people."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "started": start_of(os.getpid()), "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}


def read_claim(path):
    """(its owner or {}, what changes when its heart beats), or None where there is no such claim."""
    try:
        with open(path, "rb") as file:  # opened, not only asked for: on NFS that brings the newest time
            status = os.fstat(file.fileno())
            owner = json.loads(file.read(1000))
    except FileNotFoundError:
        return None
    except (ValueError, OSError):  # its owner died between making and writing it, or nobody may read it
        owner, status = {}, os.stat(path) if os.path.exists(path) else None
    return (owner if isinstance(owner, dict) else {}), status and (status.st_ino, status.st_mtime_ns)


def is_dead(owner):
    """Whether a claim's owner is known to be gone: a process of this host that is not there, or another one by now."""
    if owner.get("host") != socket.gethostname() or not isinstance(owner.get("pid"), int):
        return False
    try:
        os.kill(owner["pid"], 0)  # signal 0 only asks whether the process is there
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:
        pass  # it is there, another user's
    return start_of.__wrapped__(owner["pid"]) != owner.get("started")


class Heart:
    """Beats in all claims that this process holds, in a thread of its own; it ends with the last of them."""

    def __init__(self):
        self.lock, self.held, self.thread = threading.Lock(), set(), None

    def hold(self, path):
        """Begins to beat in a claim."""
        with self.lock:
            self.held.add(path)
            if not (self.thread and self.thread.is_alive()):  # a fork has the claims' set, and no thread
                self.thread = threading.Thread(target=self.beat, daemon=True)
                self.thread.start()

    def drop(self, path):
        """Removes a claim."""
        with self.lock:
            self.held.discard(path)
            path.unlink(missing_ok=True)

    def beat(self):
        """What the thread does."""
        while True:
            time.sleep(BEAT)
            with self.lock:
                for path in self.held:
                    with suppress(OSError):  # taken over, its folder gone: that must not end the heart
                        os.utime(path)
                if not self.held:
                    self.thread = None
                    return


HEART = Heart()


class Share:
    """Iterates over those of some pieces of work that this process is to do, each under a claim, until all are done by
    whichever process; waits while others hold the rest.

    folder: where claims stand, which must be there: where it vanishes, another process has finished it all, and the
    iteration ends. names: {item: name of its claim}. is_done(item): whether it is done, asked before it is claimed and
    again after. `release` is to be called after each item; leaving the context releases all. Threads may share it.
    """

    def __init__(self, folder, names, is_done):
        self.folder, self.names, self.is_done = Path(folder), names, is_done
        self.fresh, self.held = deque(names), deque()  # not looked at yet; others' when they were looked at
        self.mine, self.seen = {}, {}  # item -> claim; claim -> (stamp, when it was first seen)
        self.lock, self.closed, self.wait, self.chance = threading.Lock(), threading.Event(), SHORTEST_WAIT, random.Random()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def __iter__(self):
        return self

    def __next__(self):
        with self.lock:
            while not self.closed.is_set() and (self.fresh or self.held):
                while self.fresh:
                    item = self.fresh.popleft()
                    if self.claim(item):
                        self.wait = SHORTEST_WAIT
                        return item
                for _ in range(len(self.held)):
                    item = self.held.popleft()
                    if self.claim(item, again=True):
                        self.wait = SHORTEST_WAIT
                        return item
                if not self.folder.is_dir():
                    break
                if self.held:
                    self.closed.wait(self.wait)
                    self.wait = min(LONGEST_WAIT, 1.5 * self.wait)
            raise StopIteration

    def claim(self, item, again=False):
        """Whether the item is now this process's to do; one that another process is at is put aside. again: whether it was
        before, so that its owner's heart is listened to."""
        path = self.folder / f"{self.names[item]}.claim"
        if self.is_done(item):
            self.clear(path)
        elif create_claim(path) or again and self.is_abandoned(path) and self.take_over(path):
            HEART.hold(path)
            self.mine[item] = path
            if not self.is_done(item):
                return True
            self.release(item)  # its owner finished it between the first look and this claim
        else:
            self.held.append(item)
            # Where one is taken, its neighbours will be: what is next to look at is anywhere.
            self.fresh.rotate(self.chance.randrange(len(self.fresh) or 1))
        return False

    def is_abandoned(self, path):
        """Whether a claim's owner is dead, or its heart has stood still for too long since this process first saw it so."""
        found = read_claim(path)
        if found is None:
            return False
        owner, stamp = found
        first, since = self.seen.get(path, (None, 0))
        if first != stamp:
            self.seen[path] = stamp, (since := time.monotonic())
        return is_dead(owner) or time.monotonic() - since > EXPIRY

    def clear(self, path):
        """Removes the claim of one who was killed between the end of its work and its release."""
        if is_dead((read_claim(path) or [{}])[0]):
            path.unlink(missing_ok=True)

    def take_over(self, path):
        """Claims what was abandoned; of several that try, one succeeds."""
        aside = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.part")
        try:
            os.rename(path, aside)
            aside.unlink()
        except OSError:
            return False
        return create_claim(path)

    def release(self, item):
        """Removes the claim of an item that is done, or given up."""
        path = self.mine.pop(item, None)
        if path:
            HEART.drop(path)

    def close(self):
        """Ends the iteration, in other threads too, and releases what is held."""
        self.closed.set()
        for item in list(self.mine):
            self.release(item)


def create_claim(path):
    """Whether a claim was made: exclusive creation, which the file system gives to one process alone. Raises UserError where
    it cannot be made."""
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
        raise UserError(f"{path}: {'the disk is full; free some space and run the same command again' if full else error.strerror}") from error
    finally:
        os.close(file)
    return True


def do_once(folder, name, is_done, work):
    """`work()` in one process, where it `is_done()` by none yet; the others wait for it."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with Share(folder, {name: name}, lambda item: is_done()) as share:
        for item in share:
            work()
            share.release(item)
