"""Kills the scripts at random moments and at every file they finish, runs them to the end, and compares bit for bit.

    python tests/kill_and_resume.py --kills 20
    python tests/kill_and_resume.py --kills 0 --each_rename --programs influence

Each run is a fork of this process, which has imported everything and loaded the miniature pipeline, so that a kill lands
in the work and not in the imports. Ends with status 1 and the differences where a resumed run left anything other than
an uninterrupted one: other bytes, another record, a missing file or one too many (.part, chunks, checkpoints).
"""

import argparse
import contextlib
import json
import os
import random
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
from unlearn import artifacts, inputs, losses, models, newton
from unlearn.commands import fisher

FIXTURE = Path(__file__).parent / "parity/fixture"
MODEL = ["--dataroot", str(FIXTURE / "abc"), "--sd_version", str(FIXTURE / "sd-tiny"), "--device", "cpu", "--laion_subset_size", "12"]
TASKS = ["--task_json", str(FIXTURE / "tasks.json"), *MODEL]


def loss_arguments(folder):
    """Of compute_training_loss.py."""
    return [*TASKS, "--result_dir", str(folder), "--time_samples", "2", "--batch_size", "5"]


def influence_arguments(folder):
    """Of compute_influence.py: four steps, a checkpoint after every one."""
    return [*TASKS, "--result_dir", str(folder), "--loss_time_samples", "2", "--loss_batch_size", "5", "--unlearn_lr", "100",
            "--unlearn_steps", "4", "--unlearn_batch_size", "2", "--unlearn_grad_accum_steps", "2"]


def fisher_arguments(folder):
    """Of `python -m unlearn fisher`."""
    return [*MODEL, "--output", str(folder / "sd_fisher.safetensors"), "--num_samples", "60", "--batch_size", "4"]


PROGRAMS = {"loss": (compute_training_loss.main, loss_arguments), "influence": (compute_influence.main, influence_arguments),
            "fisher": (fisher.main, fisher_arguments)}


def prepare():
    """Loads what every run loads, and cuts the work into pieces so small that a run of a second has many of them."""
    model = models.load_model(str(FIXTURE / "sd-tiny"), "cpu")
    for module in compute_training_loss, compute_influence, fisher:
        module.load_model = lambda name, device, unet: model  # a child changes its own copy
    encode_images = inputs.encode_images
    encode = lru_cache(None)(lambda paths, resolution, mirrored: encode_images(model.pipeline, paths, resolution, mirrored))
    inputs.encode_images = lambda pipeline, paths, resolution, mirrored=False, batch_size=20: encode(tuple(paths), resolution, mirrored)
    losses.chunk_rows.__defaults__ = (3,)
    newton.CHECKPOINT_DRAWS, fisher.CHUNK_SAMPLES = 4, 10
    # Encoded here, once: the children find the pictures in the cache that they inherit.
    for path in sorted((FIXTURE / "abc/synth").rglob("*.png")):
        inputs.encode_images(model.pipeline, [FIXTURE / "abc" / path.relative_to(FIXTURE / "abc")], 512)
    exemplars = tuple((FIXTURE / f"abc/exemplar/tiny/{number}.png").resolve() for number in range(5))
    for mirrored in False, True:
        inputs.encode_images(model.pipeline, exemplars, 512, mirrored)


def kill_after_renames(count):
    """Makes this process kill itself at once after it gave the `count`-th file its final name (count > 0), or just
    before (count < 0)."""
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
    """Runs `main(arguments)` in a fork, killed after `seconds` or at its `renames`-th rename.
    Returns (whether it was killed, what it printed)."""
    with tempfile.TemporaryFile("w+") as printed:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                os.dup2(printed.fileno(), 1)
                os.dup2(printed.fileno(), 2)
                if renames:
                    kill_after_renames(renames)
                main(arguments)
                sys.stdout.flush()
                status = 0
            except BaseException as error:
                print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            finally:
                os._exit(status)
        if seconds is not None:
            time.sleep(seconds)
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        printed.seek(0)
        text = printed.read()
    if status not in (0, -signal.SIGKILL):
        raise SystemExit(f"{main.__module__} failed when it was run again: {text.splitlines()[-1]}\n  {' '.join(arguments)}")
    return status != 0, text


def contents(folder):
    """{file: what must not differ}: a record's identity and content hash, the bytes of everything else."""
    found = {}
    for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
        value = path.read_bytes()
        if path.suffix == ".json":
            value = {key: json.loads(value)[key] for key in ("identity", "content")}
        found[path.relative_to(folder).as_posix()] = value
    return found


def differences(expected, found):
    """One line for each file that is missing, left over or different."""
    return [f"{name}: {'missing' if name not in found else 'left over' if name not in expected else 'different'}"
            for name in sorted(expected.keys() | found.keys()) if expected.get(name) != found.get(name)]


def reset(folder, start):
    """Empties `folder`, but for a copy of `start`."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(start, folder)


def random_kills(main, make_arguments, start, expected, folder, duration, kills, seed):
    """Kills one run again and again, at times drawn over the duration of an uninterrupted one; a run that finishes is
    compared, and the next starts from nothing. Returns (finished runs, differences)."""
    moments, killed, finished, found = random.Random(seed), 0, 0, []
    reset(folder, start)
    while killed < kills:
        if run_child(main, make_arguments(folder), seconds=moments.uniform(0, duration))[0]:
            killed += 1
        else:
            finished, found = finished + 1, found + differences(expected, contents(folder))
            reset(folder, start)
    run_child(main, make_arguments(folder))
    return finished + 1, found + differences(expected, contents(folder))


def kills_at_each_rename(main, make_arguments, start, expected, folder, sign):
    """Kills the n-th run just after (sign 1) or just before (sign -1) it finishes a file, so that every boundary between
    two files is met on the way to the end. Returns (kills, differences)."""
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


def main():
    """Measures an uninterrupted run of each program, kills others, compares, reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="random kills of each program (default 20)")
    parser.add_argument("--each_rename", action="store_true", help="also kill just before and just after every file is finished")
    parser.add_argument("--programs", nargs="+", choices=PROGRAMS, default=list(PROGRAMS))
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments (default 0)")
    args = parser.parse_args()
    prepare()
    wrong = []
    with tempfile.TemporaryDirectory() as scratch:
        folder, reference, start, empty = (Path(scratch) / name for name in ("run", "reference", "losses", "empty"))
        empty.mkdir()
        reset(folder, empty)
        run_child(compute_training_loss.main, loss_arguments(folder))
        shutil.copytree(folder, start)  # what compute_influence.py begins with
        for name in args.programs:
            program, begin = PROGRAMS[name], start if name == "influence" else empty
            reset(folder, begin)
            clock = time.monotonic()
            run_child(program[0], program[1](folder))
            duration = time.monotonic() - clock
            shutil.rmtree(reference, ignore_errors=True)
            shutil.copytree(folder, reference)
            expected, clock = contents(reference), time.monotonic()
            reset(folder, begin)
            run_child(program[0], program[1](folder))
            found = differences(expected, contents(folder))
            finished = 0
            if args.kills:
                finished, more = random_kills(*program, begin, expected, folder, duration, args.kills, args.seed)
                found += more
            report = f"{name}: {args.kills} random kills, {finished} finished runs compared"
            if args.each_rename:
                for sign, when in (1, "after"), (-1, "before"):
                    kills, more = kills_at_each_rename(*program, begin, expected, folder, sign)
                    found, report = found + more, report + f", {kills} kills just {when} a file was finished"
            print(f"{report}; {len(expected)} files, uninterrupted {duration:.1f} s, all {time.monotonic() - clock:.0f} s")
            wrong += [f"{name}: {line}" for line in found]
    print("\n".join(sorted(set(wrong))) or "every resumed run left what an uninterrupted one leaves")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
