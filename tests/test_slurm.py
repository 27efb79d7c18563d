"""tasks/slurm on a real SLURM cluster on this machine (slurm_cluster.sh): whatever befalls a job,
the bits are those of a run without SLURM, and nothing is left over.

All stories begin at once, in threads, for much of their time goes in waiting: for SLURM, which
holds a requeued job back for some seconds, and for Python to start. Each test waits for its story's
end.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import PARITY
from kill_and_resume import contents, differences

import compute_influence
import compute_training_loss
from unlearn.commands import evaluate

ROOT = Path(__file__).parent.parent
TASKS = PARITY / "fixture/tasks.json"
DATA = ["--dataroot", str(PARITY / "fixture/abc"), "--sd_version", str(PARITY / "fixture/sd-tiny")]
COMMON = ["--task_json", str(TASKS), *DATA, "--device", "cpu"]
LOSSES = ["--time_samples", "5"]  # two chunks, of 32 and 28 images, of a second or more each
INFLUENCE = [
    "--loss_time_samples",
    "5",
    "--unlearn_lr",
    "100",
    "--unlearn_steps",
    "1",
    "--unlearn_batch_size",
    "2",
    "--unlearn_grad_accum_steps",
    "2",
]
QUERIES = [
    f"influence/tiny/gpt/blob/samples/{number:05d}.png" for number in range(2)
]  # their folders of results
SMALL = ["--mem=2G", "--cpus-per-task=1"]  # of sbatch
APART = ["--exclude=n3,n4"]  # two nodes are kept for the story of a node that is lost
FINISHED = ("COMPLETED", 0, 0)  # a job's state, exit status, and how often it was requeued


class Cluster:
    """Commands to the cluster, and its jobs."""

    def __init__(self, folder):
        self.folder = folder
        self.environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "SLURM_CONF": str(folder / "etc/slurm.conf"),
            "CLUSTER_DIR": str(folder),
            "CLUSTER_PORT": str(random.SystemRandom().randrange(20000, 30000, 10)),
            "CLUSTER_NODES": "4",
            "CLUSTER_CPUS": "8",
            "CLUSTER_GPUS": "8",
            "CLUSTER_MEMORY": "64000",
        }

    def run(self, *command, **variables):
        """What a command printed. Fails where it did."""
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, env={**self.environment, **variables}
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def submit_all(self, folder, **variables):
        """Submits the three jobs, with results in `folder`; returns their numbers."""
        printed = self.run(
            "bash",
            "tasks/slurm/submit.sh",
            *COMMON[1:],
            "--result_dir",
            str(folder / "results"),
            **{
                "SHARDS": "2",
                "SBATCH_FLAGS": " ".join([*SMALL, *APART]),
                "EVALUATE_SBATCH_FLAGS": " ".join([*SMALL, *APART]),
                "LOSSES_FLAGS": " ".join(LOSSES),
                "INFLUENCE_FLAGS": " ".join(INFLUENCE),
                "LOGS": str(folder / "logs"),
                **variables,
            },
        )
        return [part.split()[1] for part in printed.split(";")[0].split(", ")]

    def submit(self, script, folder, *flags, sbatch=APART):
        """Submits one array of tasks/slurm, of one task, with results in `folder`; returns its
        number."""
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        return self.run(
            "sbatch",
            "--parsable",
            "--array=1-1",
            f"--output={folder}/logs/%x-%A_%a.out",
            *SMALL,
            *sbatch,
            f"tasks/slurm/{script}.sbatch",
            *COMMON,
            "--result_dir",
            str(folder / "results"),
            *flags,
        )

    def jobs(self, number):
        """{field: value} of a job, or of each task of an array, in order."""
        lines = self.run("scontrol", "--oneliner", "show", "job", number).splitlines()
        fields = [
            dict(field.split("=", 1) for field in line.split() if "=" in field) for line in lines
        ]
        return sorted(fields, key=lambda job: int(job.get("ArrayTaskId", "0").split("-")[0]))

    def wait_for_end(self, number):
        """Waits until a job, or every task of an array, has ended for good; returns their
        fields."""
        wait_until(
            lambda: all(
                job["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
                for job in self.jobs(number)
            ),
            lambda: f"{number}: {self.jobs(number)}",
        )
        return self.jobs(number)


def wait_until(condition, describe, seconds=240):
    """Looks again and again. Fails, saying what is the case instead, after so many seconds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, describe()
        time.sleep(0.05)


def wait_for_chunk(folder, results):
    """Waits until one of the two chunks of the training images is scored: the other is in work."""

    def find_chunks():
        return list((folder / "results" / results).glob(".laion_loss-*/*.npy"))

    wait_until(find_chunks, lambda: f"no chunk; {read_logs(folder)}")
    assert len(find_chunks()) == 1, "the other chunk was finished too soon"


def read_logs(folder):
    """{file: text} of all logs."""
    return {path.name: path.read_text() for path in sorted((folder / "logs").glob("*"))}


def tell_of_all_three(cluster, folder):
    """The whole benchmark, of two parts; one task of the influence gets, in mid-chunk, the signal
    that SLURM sends some minutes before the time limit."""
    numbers = cluster.submit_all(folder)
    wait_for_chunk(folder, QUERIES[1])
    cluster.run("scancel", "--signal=USR1", f"{numbers[1]}_2")
    return [cluster.wait_for_end(number) for number in numbers]


def tell_of_an_error(cluster, folder):
    """A user's error in the first of the three jobs."""
    numbers = cluster.submit_all(folder, SHARDS="1", LOSSES_FLAGS="--time_samples 7")
    return [cluster.wait_for_end(number) for number in numbers]


def tell_of_a_requeue(cluster, folder):
    """scontrol requeue in mid-chunk. SLURM gives a job five seconds or more to end well, in which
    this one would finish its chunk: its program is killed first, as on a machine whose memory is
    full. The claim says which process that is."""
    number = cluster.submit("losses", folder, *LOSSES)
    wait_for_chunk(folder, "orig_loss/tiny/blob")
    claims = (folder / "results/orig_loss/tiny/blob").glob(".laion_loss-*/*.claim")
    claim = next(path for path in claims if not path.with_suffix(".npy").exists())
    os.kill(json.loads(claim.read_text())["pid"], signal.SIGKILL)
    cluster.run("scontrol", "requeue", f"{number}_1")
    return cluster.wait_for_end(number)


def tell_of_a_cancellation(cluster, folder):
    """scancel between two chunks or in the second, and the same command once more."""
    shutil.copytree(folder.parent / "expected/orig_loss", folder / "results/orig_loss")
    (folder / "one.json").write_text(json.dumps(json.loads(TASKS.read_text())[:1]))
    flags = ["--task_json", str(folder / "one.json"), *INFLUENCE]
    number = cluster.submit("influence", folder, *flags)
    wait_for_chunk(folder, QUERIES[0])
    cluster.run("scancel", number)
    return cluster.wait_for_end(number), cluster.wait_for_end(
        cluster.submit("influence", folder, *flags)
    )


def tell_of_a_lost_node(cluster, folder):
    """A node that SLURM no longer reaches, though its job runs on there, while the same job begins
    again on another node."""
    number = cluster.submit("losses", folder, *LOSSES, sbatch=["--exclude=n1,n2"])
    wait_for_chunk(folder, "orig_loss/tiny/blob")
    node = cluster.jobs(number)[0]["NodeList"]
    os.kill(int((cluster.folder / f"run/slurmd-{node}.pid").read_text()), signal.SIGKILL)
    cluster.run("scontrol", "update", f"nodename={node}", "state=down", "reason=lost")
    return node, cluster.wait_for_end(number)


STORIES = {
    "all": tell_of_all_three,
    "requeue": tell_of_a_requeue,
    "node": tell_of_a_lost_node,
    "error": tell_of_an_error,
}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Four nodes of a cluster that ends with this module."""
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    script = ["bash", str(ROOT / "tests/slurm_cluster.sh")]
    started = subprocess.run(
        [*script, "start"], capture_output=True, text=True, env=cluster.environment
    )
    if started.returncode == 77:
        pytest.skip(started.stderr.strip().splitlines()[-1])
    try:
        assert started.returncode == 0, started.stdout + started.stderr
        yield cluster
    finally:
        cluster.run(*script, "stop")


@pytest.fixture(scope="module")
def stories(cluster, tmp_path_factory):
    """Runs everything without SLURM, into the folder `expected`, and begins all stories: (folder,
    {story: its end}), to be called, which waits for it."""
    folder = tmp_path_factory.mktemp("runs")
    results = ["--result_dir", str(folder / "expected")]
    compute_training_loss.main([*COMMON, *results, *LOSSES])
    compute_influence.main([*COMMON, *results, *INFLUENCE])
    evaluate.main(["--task_json", str(TASKS), *DATA, *results])
    with ThreadPoolExecutor(len(STORIES)) as pool:
        told = {name: pool.submit(tell, cluster, folder / name) for name, tell in STORIES.items()}
        yield folder, {name: future.result for name, future in told.items()}


def compare(folder, story, *parts):
    """Differences between what a story left and what a run without SLURM leaves, of some folders of
    results."""
    assert all((folder / "expected" / part).is_dir() for part in parts)
    return [
        line
        for part in parts
        for line in differences(
            contents(folder / "expected" / part), contents(folder / story / "results" / part)
        )
    ]


def states(jobs):
    """(state, exit status, how often it was requeued) of each."""
    return [
        (job["JobState"], int(job["ExitCode"].split(":")[0]), int(job["Restarts"])) for job in jobs
    ]


def test_each_job_begins_after_all_of_the_one_before_and_they_leave_the_bits_of_a_run_without_slurm(
    stories,
):
    folder, told = stories
    losses, influence, evaluation = told["all"]()
    assert states(losses) == [FINISHED] * 2 and states(evaluation) == [FINISHED]
    assert max(job["EndTime"] for job in losses) <= min(job["StartTime"] for job in influence)
    assert max(job["EndTime"] for job in influence) <= evaluation[0]["StartTime"]
    assert compare(folder, "all", "orig_loss", "influence", "evaluate") == []


def test_the_signal_before_the_time_limit_ends_one_task_after_its_chunk_and_that_task_alone_requeues_itself(
    stories,
):
    folder, told = stories
    assert states(told["all"]()[1]) == [FINISHED, ("COMPLETED", 0, 1)]
    first, second = (
        text for name, text in read_logs(folder / "all").items() if name.startswith("influence")
    )
    assert "stopped by" not in first
    assert second.count("stopped by SIGUSR1; run the same command again to go on") == 1


def test_each_task_does_its_own_part_and_has_its_own_log(stories):
    folder, told = stories
    losses, influence, evaluation = (
        jobs[0].get("ArrayJobId", jobs[0]["JobId"]) for jobs in told["all"]()
    )
    logs = read_logs(folder / "all")
    assert sorted(logs) == sorted(
        [
            f"losses-{losses}_1.out",
            f"losses-{losses}_2.out",
            f"influence-{influence}_1.out",
            f"influence-{influence}_2.out",
            f"evaluate-{evaluation}.out",
        ]
    )
    assert "nothing to do" in logs[f"losses-{losses}_1.out"]  # one model, two parts
    for part in 1, 2:
        named = [
            f"{number:05d}.png" in logs[f"influence-{influence}_{part}.out"] for number in range(2)
        ]
        assert named == [part == 1, part == 2]
    assert "| ours " in logs[f"evaluate-{evaluation}.out"]


def test_a_users_error_fails_its_job_at_once_and_cancels_those_that_wait_for_it(stories):
    folder, told = stories
    losses, influence, evaluation = told["error"]()
    assert states(losses) == [("FAILED", 2, 0)]
    assert [state for state, *_ in states([*influence, *evaluation])] == ["CANCELLED"] * 2
    (log,) = read_logs(folder / "error").values()
    assert "error: --time_samples" in log


def test_a_job_killed_in_mid_chunk_and_requeued_leaves_the_bits_of_an_uninterrupted_run(stories):
    folder, told = stories
    assert states(told["requeue"]()) == [("COMPLETED", 0, 1)]
    (log,) = read_logs(folder / "requeue").values()
    assert "stopped by" not in log and log.count("laion_loss: 600/600 samples") == 1
    assert "(0.0 samples/s)" not in log  # the chunk that was at hand was scored again
    assert compare(folder, "requeue", "orig_loss") == []


@pytest.mark.slow  # requeueing and a lost node resume by the same code
def test_a_cancelled_job_stays_cancelled_and_submitted_again_leaves_the_bits_of_an_uninterrupted_run(
    cluster, stories
):
    folder = stories[0]
    (cancelled,), finished = tell_of_a_cancellation(cluster, folder / "cancellation")
    assert cancelled["JobState"] == "CANCELLED" and cancelled["Restarts"] == "0"
    assert states(finished) == [FINISHED]
    assert compare(folder, "cancellation", "orig_loss", QUERIES[0]) == []


def test_a_lost_nodes_job_begins_again_on_another_and_both_leave_the_bits_of_an_uninterrupted_run(
    stories,
):
    folder, told = stories
    lost, jobs = told["node"]()
    assert states(jobs) == [("COMPLETED", 0, 1)] and {lost, jobs[0]["NodeList"]} == {"n3", "n4"}
    assert compare(folder, "node", "orig_loss") == []


@pytest.mark.slow
def test_a_job_whose_time_is_nearly_up_requeues_itself_until_it_is_done(cluster, tmp_path):
    """SLURM counts limits in minutes: of one minute, the signal comes after some ten seconds."""
    longer = ["--time_samples", "50"]
    number = cluster.submit(
        "losses", tmp_path / "limit", *longer, sbatch=["--time=1", "--signal=USR1@50"]
    )
    compute_training_loss.main([*COMMON, "--result_dir", str(tmp_path / "expected"), *longer])
    (job,) = cluster.wait_for_end(number)
    assert job["JobState"] == "COMPLETED" and int(job["Restarts"]) >= 1
    assert "stopped by SIGUSR1" in "".join(read_logs(tmp_path / "limit").values())
    assert compare(tmp_path, "limit", "orig_loss") == []
