"""Work that any number of processes share under claims, without talking to each other."""

import itertools
import os
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..runtime.programs import log
from .artifacts import own_part, this_machine
from .chunks import make_folder, remove_folders
from .hashes import digest
from .leases import EXPIRY, HEART, create_claim, is_dead, read_claim

SHORTEST_WAIT, LONGEST_WAIT = 0.02, 1.0  # seconds between two looks at what others hold
USES = itertools.count()  # of folders by this process: it may use one twice at once


class Share:
    """Iterates over those of some pieces of work that this process is to do, each under a claim,
    until all are done by whichever process; waits while others hold the rest.

    folder: where claims stand, which must be there: where it vanishes, another process has finished
    it all, and the iteration ends. names: {item: name of its claim}. is_done(item): whether it is
    done, asked before it is claimed and again after. `release` is to be called after each item;
    leaving the context releases all. Threads may share it.
    """

    def __init__(
        self, folder: str | Path, names: Mapping[Any, str], is_done: Callable[[Any], bool]
    ) -> None:
        self.folder, self.names, self.is_done = Path(folder), names, is_done
        self.fresh, self.held = (
            deque(names),
            deque(),
        )  # not looked at yet; others' when they were looked at
        self.mine, self.seen = (
            {},
            {},
        )  # item -> claim; claim -> (stamp, seconds for which it stood still, last look)
        self.lock = threading.Lock()
        self.closed = threading.Event()
        self.wait = SHORTEST_WAIT
        self.chance = random.Random()
        self.told = False

    def __enter__(self) -> "Share":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def __iter__(self) -> "Share":
        return self

    def __next__(self) -> Any:
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
                    if self.wait == LONGEST_WAIT and not self.told:
                        self.tell()
                    self.closed.wait(self.wait)
                    self.wait = min(LONGEST_WAIT, 1.5 * self.wait)
            raise StopIteration

    def claim(self, item: Hashable, again: bool = False) -> bool:
        """Whether the item is now this process's to do; one that another process is at is put
        aside. again: whether it was before, so that its owner's heart is listened to."""
        path = self.folder / f"{self.names[item]}.claim"
        if self.is_done(item):
            path.unlink(
                missing_ok=True
            )  # of one who was killed, or stopped, between the end of its work and its release
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

    def take(self, item: Hashable) -> bool:
        """Whether an item that is asked for out of turn is now this process's to do."""
        with self.lock:
            return self.claim(item, again=True)

    def is_abandoned(self, path: Path) -> bool:
        """Whether a claim's owner is dead, or its heart has stood still for too long since this
        process first saw it so."""
        found = read_claim(path)
        if found is None:
            return False
        owner, stamp = found
        (first, still, last), now = self.seen.get(path, (None, 0, 0)), time.monotonic()
        # Of a long time without a look (the file server was away) only a little counts: its owner
        # could not beat either.
        still = still + min(now - last, 2 * LONGEST_WAIT) if first == stamp else 0
        self.seen[path] = stamp, still, now
        return is_dead(owner) or still > EXPIRY

    def tell(self) -> None:
        """Says, once, who is waited for."""
        owners = {
            (read_claim(self.folder / f"{self.names[item]}.claim") or ({}, None))[0].get(
                "host", "another host"
            )
            for item in self.held
        }
        log.info(
            f"waiting for {len(self.held)} pieces of work at "
            f"{', '.join(sorted(map(str, owners)))} ({self.folder})"
        )
        self.told = True

    def take_over(self, path: Path) -> bool:
        """Claims what was abandoned; of several that try, one succeeds. Raises UserError where the
        old claim cannot be removed."""
        aside = own_part(path)
        try:
            os.rename(path, aside)
            if (read_claim(aside) or (None, None))[1] != self.seen[path][
                0
            ]:  # meanwhile another has taken it over: this is its own
                with suppress(OSError):
                    os.link(aside, path)
                aside.unlink()
                return False
            aside.unlink()
        except FileNotFoundError:
            return False
        except OSError as error:
            raise UserError(
                f"{path}: its owner is gone, and it cannot be removed ({error.strerror}); remove it"
            ) from error
        return create_claim(path)

    def release(self, item: Hashable) -> None:
        """Removes the claim of an item that is done, or given up."""
        path = self.mine.pop(item, None)
        if path:
            HEART.drop(path)

    def stop(self) -> None:
        """Ends the iteration, in other threads too; what is held stays so."""
        self.closed.set()

    def close(self) -> None:
        """Ends the iteration and releases what is held."""
        self.stop()
        for item in list(self.mine):
            self.release(item)


def forget_claim(folder: str | Path, name: str) -> None:
    """Removes the claim of work that is known to be done: of one who was killed before it could.
    Where that may not be, as on a read-only file system, it does no harm."""
    with suppress(OSError):
        (Path(folder) / f"{name}.claim").unlink()


def do_once(
    folder: str | Path, name: str, is_done: Callable[[], bool], work: Callable[[], object]
) -> None:
    """`work()` in one process, where it `is_done()` by none yet; the others wait for it."""
    folder = Path(folder)
    make_folder(folder)
    with Share(folder, {name: name}, lambda item: is_done()) as share:
        for item in share:
            work()
            share.release(item)


@contextmanager
def turn(path: str | Path) -> Iterator[None]:
    """Holds the claim of what stands at `path`, for what every process is to do there itself, one
    after the other: to write it anew with its record, or to read it whole. The others wait. Who holds
    it must not ask for it again."""
    folder, name = Path(path).parent, Path(path).stem
    make_folder(folder)
    with Share(folder, {name: name}, lambda item: False) as share:
        next(share, None)
        yield


@contextmanager
def occupy(folder: str | Path, key: str, remedy: str) -> Iterator[None]:
    """Marks a folder as in use by this process for what `key` names: any number may use it for the
    same. Raises UserError, ending with `remedy`, where a living process uses it for something else."""
    folder = Path(folder)
    was_there = folder.is_dir()
    marks = f".in-use-{key[:16]}-"
    number = f"{os.getpid()}.{next(USES)}"
    own = folder / f"{marks}{digest(this_machine())[:8]}-{number}.claim"
    make_folder(folder)
    own.unlink(missing_ok=True)  # of a former process of this number
    while not create_claim(own):  # who was first in the folder has left, and removed it
        make_folder(folder)
    HEART.hold(own)
    try:
        # By the file server's clock, which stamped both.
        now = own.stat().st_mtime
        for other in folder.glob(".in-use-*.claim"):
            found = None if other == own else read_claim(other)
            if found is None:
                continue
            owner, stamp = found
            if is_dead(owner) or now - stamp[1] / 1e9 > EXPIRY:
                forget_claim(folder, other.stem)
                continue
            if other.name.startswith(marks):
                continue
            raise UserError(
                f"{folder}: is in use by process {owner.get('pid', '?')} on "
                f"{owner.get('host', 'another host')}, for something else; {remedy}"
            )
        yield
    finally:
        HEART.drop(own)
        if not was_there:
            with suppress(OSError):  # it holds something by now
                folder.rmdir()


def parts_folder(path: str | Path, key: str) -> Path:
    """Where the parts of what becomes `path` stand until all are done. key: names its settings."""
    return Path(path).parent / f".{Path(path).stem}-{key[:16]}"


def build_once(
    path: str | Path,
    key: str,
    is_done: Callable[[], bool],
    fill: Callable[[Path], Any],
    write: Callable[[Any], object],
) -> None:
    """Has `write(content)` make what stands at `path`, once, by whichever of several processes, of
    what `fill(folder)` gives: it makes, or waits for, the parts that stand in the folder until all
    is done, and may raise FileNotFoundError where another process has finished and removed it."""
    folder = parts_folder(path, key)
    while not is_done():
        make_folder(folder)
        if is_done():  # asked again: whoever was done in between has removed the folder for good
            break
        try:
            content = fill(folder)
            do_once(folder, "result", is_done, lambda: write(content))  # noqa: B023
        except FileNotFoundError:
            if folder.is_dir() and not is_done():  # another file is missing
                raise
    remove_folders(Path(path))
