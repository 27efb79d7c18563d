"""Runs the programs on generated bad inputs: none may end in a traceback, hang, take much memory or
leave something half done.

    python tests/bad_inputs.py --count 5000 --subprocesses 50

A case is one file of a valid miniature root damaged, one of its JSON values, or one flag changed
for something absurd; it belongs to its number (`--first 123 --count 1 --verbose` runs one again).
Each runs as main(argv) in a fork with 4 GB of memory and 60 seconds, or as a process of its own. It
must end with status 2, one line and an untouched result folder; inputs that turn out to be harmless
are counted apart. Ends with status 1 where a case failed.
"""

import argparse
import collections
import contextlib
import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

import kill_and_resume as runs
import numpy as np
import torch

from unlearn.commands import encode, evaluate, inputs, tasks
from unlearn.runtime import programs

SECONDS, MEMORY = 60, 4 << 30
WEIRD = [
    None,
    -1,
    0,
    1,
    2**63,
    10**400,
    1e308,
    float("inf"),
    float("nan"),
    0.5,
    "",
    "x",
    "../../../../../etc/passwd",
    "/etc/passwd",
    "/dev/zero",
    ".",
    "\0",
    "\ud800",
    "a" * 100_000,
    [],
    {},
    [[]],
    [None],
    {"": {}},
    True,
    False,
    [1] * 1000,
    "1e999",
    "cpu",
    "tiny/blob",
]
FLAGS = {
    "loss": [
        "--laion_subset_size",
        "--batch_size",
        "--time_samples",
        "--noise_seed",
        "--device",
        "--precision",
        "--compat",
        "--dataroot",
        "--task_json",
        "--sd_version",
        "--result_dir",
        "--shard",
        "--vae_batch_size",
    ],
    "influence": [
        "--unlearn_lr",
        "--unlearn_steps",
        "--unlearn_batch_size",
        "--unlearn_grad_accum_steps",
        "--damping",
        "--num_train",
        "--scoring",
        "--index",
        "--shortlist",
        "--audit",
        "--fisher_path",
        "--seed",
        "--top_k",
        "--weight_selection",
        "--loss_time_samples",
        "--loss_batch_size",
        "--result_dir",
        "--task_json",
        "--shard",
    ],
    "fisher": [
        "--num_samples",
        "--batch_size",
        "--weight_selection",
        "--seed",
        "--output",
        "--dataroot",
        "--laion_subset_size",
    ],
    "index": [
        "--task_json",
        "--output",
        "--batch_size",
        "--time_samples",
        "--fisher_path",
        "--damping",
    ],
    "evaluate": ["--task_json", "--result_dir", "--dataroot", "--methods", "--output"],
    "encode": ["--dataroot", "--vae_batch_size", "--num_captions", "--sd_version"],
    "tasks": ["--dataroot", "--output"],
}
VALUES = [
    "",
    "-1",
    "0",
    "1",
    "7",
    "1e18",
    "99999999999999999999",
    "inf",
    "nan",
    "x",
    "/dev/zero",
    "/",
    ".",
    "/nonexistent/a",
    "../..",
    "\u202e",
    "1/0",
    "0/1",
    "3/2",
    "1/1",
    "cuda:99",
    "abu",
    "exact",
    "gradient",
    "bf16",
    "a" * 5000,
]


class World:
    """A valid root in a scratch folder and the programs that run on it."""

    def __init__(self, scratch):
        self.root = scratch / "abc"
        self.pipeline = scratch / "sd-tiny"
        self.results = scratch / "results"
        shutil.copytree(runs.FIXTURE / "abc", self.root)
        shutil.copytree(runs.FIXTURE / "sd-tiny", self.pipeline)
        shutil.copy(runs.FIXTURE / "tasks.json", scratch / "tasks.json")
        (self.root / "dataset.json").write_text(
            json.dumps(
                {
                    "name": "abc",
                    "resolution": 512,
                    "time_samples": 10,
                    "latents": "laion_latents.npy",
                    "images": "laion_subset/images",
                    "num_captions": 0,
                    "damping": 0.0,
                }
            )
        )
        self.elsewhere = scratch / "elsewhere"
        self.tasks, self.scratch = scratch / "tasks.json", scratch
        data = ["--dataroot", str(self.root), "--sd_version", str(self.pipeline), "--device", "cpu"]
        task, small = ["--task_json", str(self.tasks)], ["--laion_subset_size", "3"]
        self.programs = {
            "loss": (
                runs.compute_training_loss.main,
                [
                    *task,
                    *data,
                    *small,
                    "--result_dir",
                    str(self.results),
                    "--time_samples",
                    "2",
                    "--dry_run",
                ],
            ),
            "influence": (
                runs.compute_influence.main,
                [
                    *task,
                    *data,
                    *small,
                    "--result_dir",
                    str(self.results),
                    "--loss_time_samples",
                    "2",
                    "--dry_run",
                ],
            ),
            "fisher": (
                runs.fisher.main,
                [
                    *data,
                    *small,
                    "--output",
                    str(self.results / "f.safetensors"),
                    "--num_samples",
                    "2",
                ],
            ),
            "index": (
                runs.index.main,
                [*task, *data, *small, "--output", str(self.results), "--time_samples", "2"],
            ),
            "evaluate": (
                evaluate.main,
                [*task, *data[:2], "--result_dir", str(self.results), "--methods", "pixel"],
            ),
            "encode": (encode.main, data),
            "tasks": (
                tasks.main,
                ["--dataroot", str(self.root), "--output", str(self.results / "t.json")],
            ),
        }
        self.modules = {"loss": "compute_training_loss.py", "influence": "compute_influence.py"}
        self.files = sorted(
            path
            for folder in (self.root, self.pipeline, self.tasks)
            for path in ([folder] if folder.is_file() else folder.rglob("*"))
            if path.is_file() and "laion_subset/images" not in str(path)
        )
        self.original = {path: path.read_bytes() for path in self.files}

    def restore(self, path):
        """Puts a damaged file back."""
        if path.is_symlink() or path.is_fifo():
            path.unlink()
        elif path.is_dir():
            path.rmdir()
        path.write_bytes(self.original[path])
        shutil.rmtree(self.results, ignore_errors=True)


def damage_bytes(path, content, chance):
    """One of the ways in which a file is not what it was."""
    how = chance.choice(
        [
            "flip",
            "flip",
            "cut",
            "empty",
            "junk",
            "insert",
            "long",
            "folder",
            "fifo",
            "loop",
            "zero",
            "outside",
            "gone",
        ]
    )
    content = bytearray(content)
    if how == "flip" and content:
        for _ in range(chance.choice([1, 1, 8, 64])):
            # Most of what a format says stands at its beginning or its end.
            at = chance.choice(
                [
                    chance.randrange(len(content)),
                    chance.randrange(min(200, len(content))),
                    -1 - chance.randrange(min(200, len(content))),
                ]
            )
            content[at] ^= 1 << chance.randrange(8)
    elif how == "cut":
        del content[chance.randrange(len(content) or 1) :]
    elif how == "empty":
        content = b""
    elif how == "junk":
        content = chance.randbytes(chance.choice([1, 100, len(content)]))
    elif how == "insert":
        at = chance.randrange(len(content) or 1)
        content[at:at] = chance.randbytes(chance.choice([1, 8, 1000]))
    elif how == "long":
        content = content + b"\0" * 100_000
    path.unlink()
    special = {
        "folder": path.mkdir,
        "fifo": lambda: os.mkfifo(path),
        "loop": lambda: path.symlink_to(path.name),
        "zero": lambda: path.symlink_to("/dev/zero"),
        "outside": lambda: path.symlink_to("/etc/passwd"),
        "gone": lambda: None,
    }
    special.get(how, lambda: path.write_bytes(content))()
    return how


def damage_json(path, content, chance):
    """One value of a JSON file, or the whole, is something else."""
    value = json.loads(content)
    places = []

    def visit(node):
        for key in (
            list(node)
            if isinstance(node, dict)
            else range(len(node))
            if isinstance(node, list)
            else ()
        ):
            places.append((node, key))
            visit(node[key])

    visit(value)
    how = chance.choice(["value", "value", "value", "gone", "deep", "whole"])
    if how in ("value", "gone") and places:
        node, key = chance.choice(places[:400])
        if how == "value":
            node[key] = chance.choice(WEIRD)
        else:
            del node[key]
    text = json.dumps(chance.choice(WEIRD) if how == "whole" else value)
    path.write_text(
        "[" * 200_000 if how == "deep" else text, encoding="utf-8", errors="surrogatepass"
    )
    return f"json {how}"


def damage_array(path, content, chance):
    """The header of a .npy file promises something absurd."""
    shape = chance.choice(
        [
            (10**12,),
            (-1, 4),
            (2, 60, 4, 8, 8, 10**9),
            (0,),
            (),
            (2**63, 2**63),
            (2, 0, 4, 8, 8),
            (1, 60, 4, 8, 8),
            "x",
        ]
    )
    kind = chance.choice(
        ["<f4", "<f8", "|O", "<M8[s]", "<c8", "<U9", "<i8", [("a", "<f4")], "nonsense"]
    )
    header = (
        repr(
            {"descr": kind, "fortran_order": chance.choice([False, True, 3]), "shape": shape}
        ).encode()
        + b"\n"
    )
    path.write_bytes(
        b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + content[128:]
    )
    return "array header"


class Payload:
    """What a pickle would do."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def plant_pickle(world, path):
    """A pickle that would make a file, in the place of tensors or arrays."""
    marker = world.scratch / "executed"
    if path.suffix == ".npy":
        buffer = io.BytesIO()
        np.save(buffer, np.array([Payload(marker)], object), allow_pickle=True)
        path.write_bytes(buffer.getvalue())
    else:
        torch.save({"weight": Payload(marker)}, path)
    return "pickle"


def plant_bomb(path):
    """A picture of 2.5 billion pixels in few bytes."""
    import struct
    import zlib

    part = lambda kind, data: (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    )
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + part(b"IHDR", struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0))
        + part(b"IDAT", zlib.compress(b"\0" * 1_000_000))
        + part(b"IEND", b"")
    )
    return "bomb"


def prepare_case(world, number):
    """Damages something: (program, its arguments, damaged file or None, what was done)."""
    chance = random.Random(number)
    name = chance.choices(list(world.programs), [6, 6, 2, 2, 1, 2, 1])[0]
    arguments = list(world.programs[name][1])
    if chance.random() < 0.25:
        flag, value = chance.choice(FLAGS[name]), chance.choice(VALUES)
        for position in [position for position, word in enumerate(arguments) if word == flag][::-1]:
            del arguments[position : position + 2]
        return name, [*arguments, f"{flag}={value}"], None, f"{flag}={value[:30]}"
    path = chance.choice(
        world.files
        if chance.random() < 0.6
        else [world.tasks, *(path for path in world.files if path.is_relative_to(world.root))]
    )
    content, how = world.original[path], None
    if path.suffix == ".json" and chance.random() < 0.7:
        with contextlib.suppress(ValueError):
            how = damage_json(path, content, chance)
    elif path.suffix in (".npy", ".pt", ".bin") and chance.random() < 0.3:
        how = plant_pickle(world, path)
    elif path.suffix == ".npy" and chance.random() < 0.6:
        how = damage_array(path, content, chance)
    elif path.suffix == ".png" and chance.random() < 0.2:
        how = plant_bomb(path)
    return (
        name,
        arguments,
        path,
        f"{how or damage_bytes(path, content, chance)}, {path.relative_to(world.scratch)}",
    )


def run_in_fork(main, arguments, load, folder):
    """(status, printed): of `main(arguments)` in a fork with bounds, in a folder."""
    with tempfile.TemporaryFile("w+", errors="replace") as printed:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                os.dup2(printed.fileno(), 1)
                os.dup2(printed.fileno(), 2)
                signal.alarm(SECONDS)
                os.chdir(folder)  # of relative paths among the flags
                used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
                resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
                if load:  # the pipeline's own files are damaged: they are to be read
                    for module in (runs.preparation, runs.fisher, runs.index, encode):
                        module.load_model = LOAD_MODEL
                programs.run(main, arguments)
                status = 0
            except SystemExit as end:
                status = end.code or 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        printed.seek(0)
        return status, printed.read()


LOAD_MODEL = inputs.load_model


def judge(world, status, text, as_process=False):
    """None where a case ended as it should, else what is wrong: (verdict, problem)."""
    left = [
        path.name for path in world.scratch.rglob("*") if path.name.endswith((".part", ".claim"))
    ]
    if (world.scratch / "executed").exists():
        return "failed", "code of the input was executed"
    if status == 0:
        return ("failed", f"leaves {left}") if left else ("accepted", None)
    if status != 2 or "Traceback" in text:
        return "failed", f"status {status}: {' | '.join(text.splitlines()[-4:])[:600]}"
    errors = [line for line in text.splitlines() if "error: " in line]
    if len(errors) != 1:
        return "failed", f"{len(errors)} lines of error: {text[:300]}"
    written = [path for path in world.results.rglob("*") if path.is_file()]
    return ("failed", f"leaves {left or written}") if left or written else ("refused", None)


def run_case(world, number, as_process, verbose):
    """Runs one case: (what was done, verdict, problem)."""
    name, arguments, path, what = prepare_case(world, number)
    world.elsewhere.mkdir()
    try:
        if as_process:
            root = Path(__file__).parent.parent
            command = [
                sys.executable,
                *(
                    [root / world.modules[name]]
                    if name in world.modules
                    else ["-m", "unlearn", name]
                ),
            ]
            done = subprocess.run(
                [*command, *arguments],
                capture_output=True,
                text=True,
                errors="replace",
                timeout=2 * SECONDS,
                cwd=world.elsewhere,
                env={**os.environ, "PYTHONPATH": str(root)},
            )
            status, text = done.returncode, done.stdout + done.stderr
        else:
            status, text = run_in_fork(
                world.programs[name][0],
                arguments,
                path and path.is_relative_to(world.pipeline),
                world.elsewhere,
            )
        verdict, problem = judge(world, status, text)
        if verbose:
            print(text)
        return f"{name}: {what}", verdict, problem
    except (subprocess.TimeoutExpired, ValueError) as error:
        # An argument with a null byte is no command line: the system refuses it.
        return (
            f"{name}: {what}",
            "refused" if isinstance(error, ValueError) else "failed",
            repr(error),
        )
    finally:
        if path:
            world.restore(path)
        shutil.rmtree(world.results, ignore_errors=True)
        shutil.rmtree(world.elsewhere)


def main():
    """Runs all cases, prints what failed and how many of each kind there were."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument(
        "--subprocesses", type=int, default=0, help="how many more, each a process of its own"
    )
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--verbose", action="store_true", help="print what each case prints")
    args = parser.parse_args()
    runs.prepare()
    encode.load_model = runs.fisher.load_model
    verdicts = collections.Counter()
    with tempfile.TemporaryDirectory() as scratch:
        world = World(Path(scratch))
        for number in range(args.first, args.first + args.count + args.subprocesses):
            what, verdict, problem = run_case(
                world, number, number >= args.first + args.count, args.verbose
            )
            verdicts[verdict] += 1
            if problem and verdict == "failed":
                print(f"case {number}, {what}: {problem}", flush=True)
            if (number + 1) % 500 == 0:
                print(f"{number + 1} cases: {dict(verdicts)}", flush=True)
    print(
        f"{sum(verdicts.values())} bad inputs: "
        + ", ".join(f"{count} {verdict}" for verdict, count in sorted(verdicts.items()))
    )
    sys.exit(1 if verdicts["failed"] else 0)


if __name__ == "__main__":
    main()
