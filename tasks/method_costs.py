"""What methods cost on data/emoji_small: seconds once for all 362 images, seconds a query, bytes that are kept of
an image. Writes results/evidence/speed/methods.csv and prints it. Twenty minutes on a CPU core that does nothing else.

    python tasks/method_costs.py

Each program runs three times with one result folder: for one query, again for the same, which is what starting takes,
and for ten more.
"""

import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT, TASKS, NUM_IMAGES, MORE = "data/emoji_small", "tasks/emoji_small.json", 362, 10
OUTPUT = Path("results/evidence/speed/methods.csv")
LOSSES, INFLUENCE = ["compute_training_loss.py"], ["compute_influence.py"]
BASELINES = ["-m", "unlearn", "baselines", "--methods"]
METHODS = {  # the programs of each
    "ours": [LOSSES, INFLUENCE],
    "output": [[*INFLUENCE, "--scoring", "output"]],
    "removal": [[*INFLUENCE, "--scoring", "removal"]],
    "das": [[*BASELINES, "das"]],
    "dtrak": [[*BASELINES, "dtrak"]],
    "similarity": [[*BASELINES, "similarity"]],
}


def run(programs: list[list[str]], tasks: Path, results: Path) -> float:
    """Seconds of some programs, one after the other."""
    start = time.monotonic()
    for words in programs:
        flags = ["--task_json", str(tasks), "--dataroot", ROOT, "--result_dir", str(results)]
        subprocess.run(
            [sys.executable, *words, *flags, "--device", "cpu"],
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    return time.monotonic() - start


def count_bytes(folder: Path) -> int:
    """Bytes of the files below a folder that serve further queries: all but the queries' own results."""
    return sum(
        path.stat().st_size
        for path in folder.rglob("*")
        if path.is_file() and "queries" not in path.parts
    )


def measure(programs: list[list[str]], folder: Path) -> dict[str, float]:
    """Seconds and bytes of a method."""
    tasks = json.loads(Path(TASKS).read_text())
    one, more = folder / "one.json", folder / "more.json"
    one.write_text(json.dumps(tasks[:1]))
    more.write_text(json.dumps(tasks[: 1 + MORE]))
    first, again, further = (run(programs, file, folder / "results") for file in (one, one, more))
    a_query = (further - again) / MORE
    kept = count_bytes(folder / "results") / NUM_IMAGES
    return {"once": first - again - a_query, "query": a_query, "bytes": kept}


def main() -> None:
    """Measures one method after the other."""
    rows = []
    for name, programs in METHODS.items():
        with TemporaryDirectory() as folder:
            found = measure(programs, Path(folder))
        rows.append(
            {
                "method": name,
                "seconds_once": f"{max(0, found['once']):.1f}",
                "seconds_a_query": f"{found['query']:.2f}",
                "bytes_an_image": f"{found['bytes']:.0f}",
            }
        )
        print(rows[-1], flush=True)
    with OUTPUT.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
