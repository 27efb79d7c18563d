"""Kills the scripts at random moments and at every file they finish, runs them to the end, and
compares bit for bit.

    python tests/kill_and_resume.py --kills 20
    python tests/kill_and_resume.py --kills 14 --processes 1 2 4 --log kills.txt      # 210 kills; run again, it goes on
    python tests/kill_and_resume.py --kills 0 --each_rename --programs influence

Each run is one or more forks of this process, which has imported everything and loaded the
miniature pipeline, so that a kill lands in the work and not in the imports. One of them is killed:
by SIGKILL, by SIGTERM, which ends after the piece of work at hand, or for want of memory (its limit
is lowered to what it has); the others go on. Ends with status 1 and the differences where a resumed
run left anything other than an uninterrupted one: other bytes, another record, a missing file or
one too many (.part, chunks, checkpoints).
"""

import argparse
import contextlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from functools import lru_cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

torch.set_num_threads(1)  # before any work: a fork does not survive the threads of its parent

import compute_influence
import compute_training_loss
from unlearn.attribution import draws, estimation, newton
from unlearn.commands import fisher, index, preparation
from unlearn.datasets import queries
from unlearn.models import pipelines
from unlearn.runtime import signals
from unlearn.storage import artifacts

FIXTURE = Path(__file__).parent / "parity/fixture"
MODEL = [
    "--dataroot",
    str(FIXTURE / "abc"),
    "--sd_version",
    str(FIXTURE / "sd-tiny"),
    "--device",
    "cpu",
    "--laion_subset_size",
    "12",
]
TASKS = ["--task_json", str(FIXTURE / "tasks.json"), *MODEL]


def loss_arguments(folder):
    """Of compute_training_loss.py."""
    return [*TASKS, "--result_dir", str(folder), "--time_samples", "2", "--batch_size", "5"]


def influence_arguments(folder):
    """Of compute_influence.py: four steps, a checkpoint after every one."""
    return [
        *TASKS,
        "--result_dir",
        str(folder),
        "--loss_time_samples",
        "2",
        "--loss_batch_size",
        "5",
        "--unlearn_lr",
        "100",
        "--unlearn_steps",
        "4",
        "--unlearn_batch_size",
        "2",
        "--unlearn_grad_accum_steps",
        "2",
    ]


def fisher_arguments(folder):
    """Of `python -m unlearn fisher`."""
    return [
        *MODEL,
        "--output",
        str(folder / "sd_fisher.safetensors"),
        "--num_samples",
        "60",
        "--batch_size",
        "4",
    ]


def gradient_arguments(folder):
    """Of compute_influence.py --scoring gradient."""
    return [*influence_arguments(folder), "--scoring", "gradient"]


def index_arguments(folder):
    """Of `python -m unlearn index`."""
    return [*TASKS, "--output", str(folder / "index"), "--time_samples", "2", "--batch_size", "5"]


PROGRAMS = {
    "loss": (compute_training_loss.main, loss_arguments),
    "influence": (compute_influence.main, influence_arguments),
    "fisher": (fisher.main, fisher_arguments),
    "gradient": (compute_influence.main, gradient_arguments),
    "index": (index.main, index_arguments),
}


def prepare():
    """Loads what every run loads, and cuts the work into pieces so small that a run of a second has
    many of them."""
    model = pipelines.load_model(str(FIXTURE / "sd-tiny"), "cpu")
    for module in preparation, fisher, index:
        module.load_model = lambda *names, **more: model  # a child changes its own copy
    encode_images = queries.encode_images
    encode = lru_cache(None)(
        lambda paths, resolution, mirrored: encode_images(model, paths, resolution, mirrored)
    )
    queries.encode_images = lambda model, paths, resolution, mirrored=False, batch_size=20: encode(
        tuple(paths), resolution, mirrored
    )
    draws.chunk_rows.__defaults__ = (3,)
    newton.CHECKPOINT_DRAWS, estimation.CHUNK_SAMPLES = 4, 10
    # Encoded here, once: the children find the pictures in the cache that they inherit.
    for path in sorted((FIXTURE / "abc/synth").rglob("*.png")):
        queries.encode_images(model, [FIXTURE / "abc" / path.relative_to(FIXTURE / "abc")], 512)
    exemplars = tuple(
        (FIXTURE / f"abc/exemplar/tiny/{number}.png").resolve() for number in range(5)
    )
    for mirrored in False, True:
        queries.encode_images(model, exemplars, 512, mirrored)


def kill_after_renames(count):
    """Makes this process kill itself at once after it gave the `count`-th file its final name
    (count > 0), or just before (count < 0)."""
    replace, done = os.replace, [0]

    def replace_and_die(source, target):
        done[0] += 1
        if done[0] == -count:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)
        if done[0] == count:
            os.kill(os.getpid(), signal.SIGKILL)

    artifacts.os.replace = replace_and_die


def run_child(main, arguments, seconds=None, renames=None):
    """`run_children` of one process: (whether it was killed, what it printed)."""
    [status], text = run_children(main, arguments, 1, seconds, "SIGKILL", renames)
    return status != 0, text


def run_children(main, arguments, num_processes=1, seconds=None, how="SIGKILL", renames=None):
    """`run_forks`, the first of which may end as `how` ends it; all others must succeed."""
    statuses, text = run_forks(main, arguments, num_processes, seconds, how, renames)
    allowed = {"SIGTERM": {0, os.EX_TEMPFAIL}}.get(how, {0, -signal.SIGKILL})
    if (
        how != "memory" and statuses[0] not in allowed or any(statuses[1:])
    ):  # for want of memory it may end in any way
        raise SystemExit(
            f"{main.__module__} ended with {statuses} after {how}:\n{text}\n  {' '.join(arguments)}"
        )
    return statuses, text


def run_forks(main, arguments, num_processes=1, seconds=None, how="SIGKILL", renames=None):
    """Runs `main(arguments)` in forks, the first of which is killed after `seconds` or at its
    `renames`-th rename; as many that know nothing of each other where the number is negative.
    Returns (their statuses, what they printed)."""
    with tempfile.TemporaryFile("w+") as printed:
        children = []
        # A signal that comes before a fork has its handler waits for it.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        for rank in range(abs(num_processes)):
            if (child := os.fork()) == 0:
                run_fork(
                    main,
                    arguments,
                    printed,
                    *((rank, num_processes) if num_processes > 0 else (0, 1)),
                    renames,
                )
            children.append(child)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        if seconds is not None:
            wait_for_end(children[0], seconds)
            with contextlib.suppress(ProcessLookupError):
                kill(children[0], how)
        statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        printed.seek(0)
        return statuses, printed.read()


def wait_for_end(child, seconds):
    """Waits until a child has ended, which is not asked for its status yet, or for so many
    seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and not os.waitid(
        os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT
    ):
        time.sleep(min(0.005, max(0, end - time.monotonic())))


def run_fork(main, arguments, printed, rank, num_processes, renames):
    """What a fork does: `main(arguments)` as the given one of several processes; never returns."""
    status = 1
    try:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(num_processes))
        os.dup2(printed.fileno(), 1)
        os.dup2(printed.fileno(), 2)
        signals.STOP.install()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        if renames:
            kill_after_renames(renames)
        main(arguments)
        sys.stdout.flush()
        status = 0
    except signals.Stopped:
        status = os.EX_TEMPFAIL
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    finally:
        os._exit(status)


def kill(child, how):
    """Kills a process, or gives it no more memory and kills it where it lives on, as the kernel
    does."""
    if how == "memory":
        resource.prlimit(child, resource.RLIMIT_AS, (1, 1))
        time.sleep(0.05)
        os.kill(child, signal.SIGKILL)
    else:
        os.kill(child, getattr(signal, how))


def contents(folder):
    """{file: what must not differ}: a record's identity and content hash, the bytes of everything
    else."""
    found = {}
    for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
        value = path.read_bytes()
        if path.suffix == ".json":
            value = {key: json.loads(value)[key] for key in ("identity", "content")}
        found[path.relative_to(folder).as_posix()] = value
    return found


def differences(expected, found):
    """One line for each file that is missing, left over or different."""
    return [
        f"{name}: "
        f"{'missing' if name not in found else 'left over' if name not in expected else 'different'}"
        for name in sorted(expected.keys() | found.keys())
        if expected.get(name) != found.get(name)
    ]


def reset(folder, start):
    """Empties `folder`, but for a copy of `start`."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(start, folder)


def random_kills(
    main, make_arguments, start, expected, folder, duration, kills, seed, num_processes, hows
):
    """Kills one run again and again, at times drawn over the duration of an uninterrupted one, the
    shortest that was seen: the machine may have been busy with other work. A run that finishes is
    compared, and the next starts from nothing. Returns (finished runs, differences)."""
    moments, killed, finished, found = random.Random(seed), 0, 0, []
    reset(folder, start)
    while killed < kills:
        clock = time.monotonic()
        statuses, _ = run_children(
            main,
            make_arguments(folder),
            num_processes,
            moments.uniform(0, duration),
            hows[killed % len(hows)],
        )
        killed += statuses[0] != 0
        if statuses[0] == 0:
            duration = min(duration, time.monotonic() - clock)
        if 0 in statuses:
            finished, found = finished + 1, found + differences(expected, contents(folder))
            reset(folder, start)
    run_children(main, make_arguments(folder), num_processes)
    return finished + 1, found + differences(expected, contents(folder))


def kills_at_each_rename(main, make_arguments, start, expected, folder, sign):
    """Kills the n-th run just after (sign 1) or just before (sign -1) it finishes a file, so that
    every boundary between two files is met on the way to the end. Returns (kills, differences)."""
    reset(folder, start)
    kills, renames = 0, 1
    while True:
        before = without_claims(contents(folder))
        if not run_child(main, make_arguments(folder), renames=sign * renames)[0]:
            return kills, differences(expected, contents(folder))
        kills += 1
        # Where a run only did again what the last one did, the next kill comes one file later.
        renames += without_claims(contents(folder)) == before or sign < 0


def without_claims(found):
    """Files that say what is done, not who is at it."""
    return {name: value for name, value in found.items() if not name.endswith(".claim")}


def measure(name, args, scratch, num_processes):
    """Kills one program as the flags say: (report, differences)."""
    folder, start, empty = (Path(scratch) / part for part in ("run", "losses", "empty"))
    program, begin = PROGRAMS[name], start if name == "influence" else empty
    reset(folder, begin)
    clock = time.monotonic()
    run_child(program[0], program[1](folder))
    duration, expected = time.monotonic() - clock, contents(folder)
    reset(folder, begin)
    run_children(program[0], program[1](folder), num_processes)
    found, finished, clock = differences(expected, contents(folder)), 0, time.monotonic()
    report = f"{name}, {num_processes} processes"
    if args.kills:
        finished, more = random_kills(
            *program,
            begin,
            expected,
            folder,
            duration,
            args.kills,
            args.seed,
            num_processes,
            args.signals,
        )
        found = found + more
        report = report + f": {args.kills} random kills, {finished} finished runs compared"
    if args.each_rename:
        for sign, when in (1, "after"), (-1, "before"):
            kills, more = kills_at_each_rename(*program, begin, expected, folder, sign)
            found = found + more
            report = report + f", {kills} kills just {when} a file was finished"
    report += (
        f"; {len(expected)} files, uninterrupted {duration:.1f} s, all "
        f"{time.monotonic() - clock:.0f} s"
    )
    return report, [f"{name}, {num_processes} processes: {line}" for line in found]


def main():
    """Measures an uninterrupted run of each program, kills others, compares, reports."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--kills", type=int, default=20, help="random kills of each program (default 20)"
    )
    parser.add_argument(
        "--each_rename",
        action="store_true",
        help="also kill just before and just after every file is finished",
    )
    parser.add_argument("--programs", nargs="+", choices=PROGRAMS, default=list(PROGRAMS))
    parser.add_argument(
        "--processes", type=int, nargs="+", default=[1], help="how many share each run (default 1)"
    )
    parser.add_argument(
        "--signals",
        nargs="+",
        choices=("SIGKILL", "SIGTERM", "memory"),
        default=["SIGKILL", "SIGTERM", "memory"],
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments (default 0)")
    parser.add_argument(
        "--log", type=Path, help="file of reports; what it reports already is not done again"
    )
    args = parser.parse_args()
    prepare()
    lines, wrong = args.log.read_text().splitlines() if args.log and args.log.exists() else [], []
    with tempfile.TemporaryDirectory() as scratch:
        start, empty = Path(scratch) / "losses", Path(scratch) / "empty"
        empty.mkdir()
        run_child(
            compute_training_loss.main, loss_arguments(start)
        )  # what compute_influence.py begins with
        for name in args.programs:
            for num_processes in args.processes:
                if any(line.startswith(f"{name}, {num_processes} processes") for line in lines):
                    continue
                report, found = measure(name, args, scratch, num_processes)
                print(report, flush=True)
                wrong += found
                if args.log and not found:
                    with args.log.open("a") as file:
                        print(report, file=file)
    print(
        "\n".join(sorted(set(wrong))) or "every resumed run left what an uninterrupted one leaves"
    )
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
