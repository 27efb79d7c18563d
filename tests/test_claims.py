"""Claims: every piece of work is done, by one process wherever nothing goes wrong, and nobody waits
for the dead."""

import heapq
import json
import os
import signal
import threading
import time

import pytest

from unlearn import UserError
from unlearn.storage import leases, sharing
from unlearn.storage.chunks import remove_folders
from unlearn.storage.leases import create_claim, read_claim
from unlearn.storage.sharing import Share, do_once


def work_through(folder, names, seconds, counts=None):
    """Does what a process does: claims, works for so long, writes, releases. Returns (items done,
    seconds of work)."""
    mine, busy = [], 0
    with Share(folder, names, lambda item: (folder / f"{item}.done").exists()) as share:
        for item in share:
            begun = time.monotonic()
            time.sleep(seconds)
            (folder / f"{item}.done").write_text("")
            busy += time.monotonic() - begun
            share.release(item)
            mine.append(item)
    return mine, busy


def run_workers(folder, names, speeds):
    """Workers of these seconds a piece, in threads: [(items, seconds of work)], seconds from start
    to end."""
    found, start = [None] * len(speeds), time.monotonic()

    def run(worker):
        found[worker] = work_through(folder, names, speeds[worker])

    threads = [threading.Thread(target=run, args=(worker,)) for worker in range(len(speeds))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found, time.monotonic() - start


def names_of(count):
    return {number: f"{number:06d}" for number in range(count)}


def test_every_piece_is_done_once_and_no_claim_is_left(tmp_path):
    found, _ = run_workers(tmp_path, names_of(60), [0.001] * 8)
    assert sorted(item for items, _ in found for item in items) == list(range(60))
    assert not list(tmp_path.glob("*.claim*"))


class Idle(Exception):
    """A worker found nothing to do but to wait for others."""


def simulate(folder, count, seconds_a_piece):
    """Workers with claims in real files and work in simulated time, to which what claiming really
    takes is added: (pieces done, share of the time from the start to the last one's end that all
    were at work)."""
    shares = []
    for _ in seconds_a_piece:
        share = Share(folder, names_of(count), lambda item: (folder / f"{item}.done").exists())
        share.closed.wait = lambda seconds: (_ for _ in ()).throw(Idle)
        shares.append(share)
    events, done, busy, end = [(0.0, worker, None) for worker in range(len(shares))], 0, 0.0, 0.0
    while events:
        now, worker, finished = heapq.heappop(events)
        begun = time.perf_counter()
        if finished is not None:
            (folder / f"{finished}.done").write_text("")
            shares[worker].release(finished)
            done, end = done + 1, max(end, now)
        try:
            item = next(shares[worker])
        except (Idle, StopIteration):
            continue
        heapq.heappush(
            events, (now + time.perf_counter() - begun + seconds_a_piece[worker], worker, item)
        )
        busy += seconds_a_piece[worker]
    return done, busy / (len(shares) * end)


def test_sixty_four_workers_of_uneven_speed_are_busy_for_95_percent_of_the_time(tmp_path):
    """64 devices, the fastest eight times as fast as the slowest, 1 to 8 s a piece; 3,125 pieces,
    as 100,000 images have."""
    done, busy = simulate(tmp_path, 3125, [8 ** (worker / 63) for worker in range(64)])
    print(f"busy {busy:.2%}")
    assert done == 3125 and not list(tmp_path.glob("*.claim*"))
    assert busy >= 0.95


@pytest.fixture
def dead_owner(tmp_path):
    """A claim `work.claim` of a process that was killed."""
    child = os.fork()
    if child == 0:
        create_claim(tmp_path / "work.claim")
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    return tmp_path / "work.claim"


def test_a_claim_of_a_process_that_was_killed_here_is_taken_over_at_once(dead_owner):
    done = []
    do_once(dead_owner.parent, "work", lambda: bool(done), lambda: done.append(1))
    assert done == [1] and not dead_owner.exists()


def test_a_claim_that_was_left_beside_finished_work_is_removed(dead_owner):
    do_once(dead_owner.parent, "work", lambda: True, lambda: pytest.fail("done again"))
    assert not dead_owner.exists()


def test_a_number_given_to_another_process_does_not_keep_a_claim_alive(tmp_path):
    claim = tmp_path / "work.claim"
    claim.write_text(json.dumps({**leases.describe_owner(), "pid": os.getppid(), "started": "1"}))
    done = []
    do_once(tmp_path, "work", lambda: bool(done), lambda: done.append(1))
    assert done == [1]


@pytest.mark.parametrize(
    "content",
    ['{"host": "elsewhere", "pid": 1}', "", "no JSON", "[1]", '{"host": "elsewhere", "pid": "x"}'],
)
@pytest.mark.parametrize("skew", [-1e6, 0, 1e6])
def test_a_claim_of_another_host_expires_by_the_observers_clock_whatever_its_own_says(
    tmp_path, monkeypatch, content, skew
):
    monkeypatch.setattr(sharing, "EXPIRY", 0.5)
    claim, done = tmp_path / "work.claim", []
    claim.write_text(content)
    os.utime(claim, (time.time() + skew,) * 2)
    start = time.monotonic()
    do_once(tmp_path, "work", lambda: bool(done), lambda: done.append(1))
    assert done == [1] and 0.5 < time.monotonic() - start < 5


@pytest.mark.parametrize("skew", [-1e6, 1e6])
def test_a_claim_whose_heart_beats_is_waited_for_whatever_its_hosts_clock_says(
    tmp_path, monkeypatch, skew
):
    monkeypatch.setattr(sharing, "EXPIRY", 0.5)
    claim, done, stop = tmp_path / "work.claim", [], threading.Event()
    claim.write_text('{"host": "elsewhere", "pid": 1}')

    def live():
        beats = 0
        while not stop.wait(0.1) and beats < 15:
            beats += 1
            os.utime(claim, (time.time() + skew + beats,) * 2)
        done.append("theirs")
        claim.unlink()

    other = threading.Thread(target=live)
    other.start()
    do_once(tmp_path, "work", lambda: bool(done), lambda: done.append("mine"))
    other.join()
    assert done == ["theirs"]


def test_a_living_process_beats_in_the_claims_it_holds(tmp_path, monkeypatch):
    monkeypatch.setattr(leases, "BEAT", 0.05)
    monkeypatch.setattr(sharing, "HEART", leases.Heart())
    with Share(tmp_path, {0: "work"}, lambda item: False) as share:
        next(share)
        stamps = set()
        for _ in range(10):
            stamps.add(read_claim(tmp_path / "work.claim")[1])
            time.sleep(0.05)
        assert len(stamps) >= 3
        share.release(0)
    assert not (tmp_path / "work.claim").exists()


def test_who_waits_ends_when_another_process_has_finished_all_and_removed_the_folder(tmp_path):
    folder = tmp_path / "chunks"
    folder.mkdir()
    (folder / "0.claim").write_text('{"host": "elsewhere", "pid": 1}')

    def finish():
        time.sleep(0.3)
        (folder / "0.claim").unlink()
        folder.rmdir()

    other = threading.Thread(target=finish)
    other.start()
    with Share(folder, {0: "0"}, lambda item: False) as share:
        assert list(share) == []
    other.join()


def test_a_claim_on_a_full_disk_or_without_permission_ends_in_one_line_and_leaves_none(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(
        leases.os,
        "write",
        lambda *args: (_ for _ in ()).throw(OSError(28, "No space left on device")),
    )
    with pytest.raises(UserError, match="the disk is full"):
        create_claim(tmp_path / "work.claim")
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(
        leases.os,
        "open",
        lambda *args: (_ for _ in ()).throw(PermissionError(13, "Permission denied")),
    )
    with pytest.raises(UserError, match="cannot be written .Permission denied"):
        create_claim(tmp_path / "work.claim")


def test_a_claim_that_another_has_taken_over_meanwhile_is_left_to_it(tmp_path, dead_owner):
    """Both see the dead owner; the other one is faster by a whole takeover."""
    share = Share(tmp_path, {0: "work"}, lambda item: False)
    assert share.is_abandoned(dead_owner)
    dead_owner.unlink()
    assert create_claim(dead_owner)  # the other's
    content = dead_owner.read_bytes()
    assert not share.take_over(dead_owner)
    assert dead_owner.read_bytes() == content and [path.name for path in tmp_path.iterdir()] == [
        "work.claim"
    ]


def test_a_dead_claim_that_cannot_be_removed_ends_in_one_line_and_not_in_waiting(
    dead_owner, monkeypatch
):
    monkeypatch.setattr(
        sharing.os,
        "rename",
        lambda *args: (_ for _ in ()).throw(PermissionError(1, "Operation not permitted")),
    )
    with pytest.raises(
        UserError,
        match="work.claim: its owner is gone, and it cannot be removed .Operation not "
        "permitted.; remove it",
    ):
        do_once(dead_owner.parent, "work", lambda: False, lambda: None)


def test_process_numbers_of_another_boot_or_container_of_the_same_name_mean_nothing_here(
    dead_owner, monkeypatch
):
    owner = json.loads(dead_owner.read_text())
    assert leases.is_dead(owner)
    assert not leases.is_dead({**owner, "host": owner["host"][:-8] + "0" * 8})


def test_an_absence_of_the_file_server_is_not_taken_for_the_owners(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(sharing.time, "monotonic", lambda: clock[0])
    (tmp_path / "work.claim").write_text('{"host": "elsewhere", "pid": 1}')
    share = Share(tmp_path, {0: "work"}, lambda item: False)
    for seconds in 0, 1, 1000, *[1] * 85:
        clock[0] += seconds
        assert not share.is_abandoned(tmp_path / "work.claim")
    clock[0] += 2
    assert not share.is_abandoned(tmp_path / "work.claim")
    clock[0] += 1
    assert share.is_abandoned(
        tmp_path / "work.claim"
    )  # more than EXPIRY seconds, in which it could look


def test_a_share_that_was_stopped_keeps_its_claims_until_its_work_is_finished(tmp_path):
    with Share(tmp_path, {0: "0", 1: "1"}, lambda item: False) as share:
        item = next(share)
        share.stop()
        assert list(share) == [] and (tmp_path / f"{item}.claim").exists()
    assert not list(tmp_path.iterdir())


def test_who_looks_for_a_chunk_while_they_are_removed_finds_it_or_no_folder(tmp_path):
    for number in range(20):
        folder = tmp_path / f".loss-{number}"
        folder.mkdir()
        for chunk in range(50):
            (folder / f"{chunk}.npy").write_text("")
        remover = threading.Thread(target=remove_folders, args=(tmp_path / "loss.npy",))
        remover.start()
        while folder.is_dir():
            assert (folder / "7.npy").exists() or not folder.is_dir()
        remover.join()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "make",
    [lambda path: path.symlink_to("nowhere"), os.mkfifo, lambda path: path.mkdir()],
    ids=["link", "pipe", "folder"],
)
def test_a_claim_that_is_no_file_is_not_waited_for_for_ever(tmp_path, monkeypatch, make):
    monkeypatch.setattr(sharing, "EXPIRY", 0.3)
    make(tmp_path / "work.claim")
    done = []
    try:
        do_once(tmp_path, "work", lambda: bool(done), lambda: done.append(1))
        assert done == [1]
    except UserError as error:
        assert "it cannot be removed" in str(error)


def test_a_claim_that_may_not_be_removed_does_not_hide_the_error_that_ended_the_work(
    tmp_path, monkeypatch
):
    with (
        pytest.raises(ZeroDivisionError),
        Share(tmp_path, {0: "work"}, lambda item: False) as share,
    ):
        next(share)
        monkeypatch.setattr(
            leases.Path,
            "unlink",
            lambda *args, **kwargs: (_ for _ in ()).throw(PermissionError(13, "Permission denied")),
        )
        raise ZeroDivisionError


def test_a_claim_that_goes_while_it_is_read_is_none(tmp_path, monkeypatch):
    """Its owner has made it, not written it yet, and is done at once."""
    (path := tmp_path / "a.claim").touch()

    def remove(content):
        path.unlink()
        raise ValueError("empty")

    monkeypatch.setattr(leases.json, "loads", remove)
    assert read_claim(path) is None
