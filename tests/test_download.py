"""data/download_abc.sh, run whole against a small stand-in of the hub on this machine."""

import fcntl
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).parent.parent / "data/download_abc.sh"
SEVEN = next(filter(None, map(shutil.which, ("7z", "7zz", "7za"))), None)
IMAGES, ABU = "sywang/GenDataAttribution", "sywang/AttributeByUnlearning"
LAION_GROUPS = ("LAION subset", "latents, embeddings and Fisher")
pytestmark = [
    pytest.mark.skipif(SEVEN is None, reason="needs 7z (apt install 7zip), as the script does"),
    pytest.mark.skipif(
        not (Path(sys.executable).parent / "hf").exists(), reason="needs the hf command"
    ),
]


class Hub(ThreadingHTTPServer):
    """The hub's file protocol: repository info, tree listing, HEAD and GET of files.

    `files`: (repository, path) -> bytes. `damaged`: path -> bytes that its next GET gives instead.
    A GET of `held` sends half of the file, sets `is_holding` and waits.
    """

    daemon_threads = True

    def __init__(self, files):
        super().__init__(("127.0.0.1", 0), Answer)
        self.files = files
        self.damaged = {}
        self.held = None
        self.is_holding = threading.Event()
        self.gets = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def commit(self):
        """The hash of the commit: another one as soon as the files change."""
        return hashlib.sha1("".join(path for _, path in self.files).encode()).hexdigest()


class Answer(BaseHTTPRequestHandler):
    """One request to the stand-in."""

    def log_message(self, *args):
        """Stays silent."""

    def send(self, body, headers=(), only_head=False):
        """Sends headers and, for a GET, the body."""
        self.send_response(200)
        for name, value in {"Content-Length": len(body), **dict(headers)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if not only_head:
            self.wfile.write(body)

    def file(self):
        """The repository, the path and the content of the file that
        /datasets/REPO/resolve/REVISION/PATH names."""
        repository, _, rest = self.path.removeprefix("/datasets/").partition("/resolve/")
        path = rest.partition("/")[2]
        content = self.server.files[repository, path]
        return (
            path,
            content,
            {
                "ETag": f'"{hashlib.sha1(content).hexdigest()}"',
                "X-Repo-Commit": self.server.commit(),
            },
        )

    def do_HEAD(self):
        """Size, hash and commit of a file."""
        _, content, headers = self.file()
        self.send(content, headers, only_head=True)

    def do_GET(self):
        """Repository info, tree listing or a file."""
        if self.path.startswith("/api/datasets/"):
            repository = "/".join(self.path.split("/")[3:5])
            info = {
                "id": repository,
                "sha": self.server.commit(),
                "siblings": [],
                "tags": [],
                "private": False,
            }
            tree = [
                {
                    "type": "file",
                    "path": path,
                    "size": len(content),
                    "oid": hashlib.sha1(content).hexdigest(),
                }
                for (owner, path), content in self.server.files.items()
                if owner == repository
            ]
            return self.send(json.dumps(tree if "/tree/" in self.path else info).encode())
        if not self.path.startswith("/datasets/"):
            return self.send_error(404)
        path, content, headers = self.file()
        self.server.gets.append(path)
        if path == self.server.held:
            self.send(content, headers, only_head=True)
            self.wfile.write(content[: len(content) // 2])
            self.server.is_holding.set()
            return time.sleep(60)
        return self.send(self.server.damaged.pop(path, content), headers)


def array_bytes(array):
    """An array as the bytes of an .npy file."""
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def benchmark_files():
    """The data root that a complete download gives: path -> bytes."""
    noise = np.random.default_rng(0)
    files = {}
    for test_case in ("artchive", "bamfg", "observed_imagenet", "unobserved_imagenet"):
        domain = "imagenet" if "imagenet" in test_case else test_case
        names = {
            "exemplar": [f"exemplar/{domain}/{test_case}/0.png"],
            "gpt": [f"synth/{domain}/gpt/{test_case}/samples/{i:05d}.png" for i in range(2)],
        }
        files |= {name: noise.bytes(700) for name in sum(names.values(), [])}
        files[f"models/{domain}/{test_case}/pytorch_custom_diffusion_weights.pt"] = noise.bytes(700)
        entry = {
            "exemplar": [f"dataset/{name}" for name in names["exemplar"]],
            "synth": {"gpt": [f"dataset/{name}" for name in names["gpt"]]},
            "class_id": 0,
            "category": "art",
        }
        files[f"json/test_{test_case}.json"] = json.dumps([entry]).encode()
    files |= {f"laion_subset/images/{i}.jpg": noise.bytes(700) for i in range(3)}
    return files | {
        "laion_subset/captions.txt": b"a\nb\nc\n",
        "path_to_prompts.json": b"{}",
        "imagenet_class_to_categories.json": b"{}",
        "sd_fisher.pt": noise.bytes(900),
        "laion_latents.npy": array_bytes(noise.random((6, 4, 8, 8)).astype("f2")),
        "laion_text_embeddings.npy": array_bytes(noise.random((3, 7, 8)).astype("f2")),
    }


def pack(folder, files, volume="1k"):
    """A multi-volume 7z archive of the files: number of the volume -> bytes."""
    content = folder / "content"
    for name, data in files.items():
        (content / name).parent.mkdir(parents=True, exist_ok=True)
        (content / name).write_bytes(data)
    subprocess.run(
        [SEVEN, "a", "-bso0", "-mx1", f"-v{volume}", "../made.7z", "."], cwd=content, check=True
    )
    return {path.suffix: path.read_bytes() for path in sorted(folder.glob("made.7z.*"))}


def below(files, folder, new=""):
    """The files below a folder, which is renamed."""
    return {
        new + name.removeprefix(folder): data
        for name, data in files.items()
        if name.startswith(folder)
    }


def hub_files(folder, files):
    """What the hub holds: plain files and archives, with the top folder, another one, or none."""
    archives = {
        (IMAGES, "exemplar/exemplar.7z"): below(files, "exemplar/"),
        (IMAGES, "synth_test/synth.7z"): {
            name: data
            for name, data in below(files, "synth/", "synth_test/").items()
            if "artchive" not in name
        },
        (IMAGES, "synth_test/artchive.7z"): below(files, "synth/artchive/"),
        (IMAGES, "models_test/models_test.7z"): below(files, "models/", "dataset/models/"),
        (IMAGES, "laion_subset/images.7z"): below(files, "laion_subset/images/"),
        (ABU, "abc/laion_latents.7z"): below(files, "laion_latents.npy", "laion_latents.npy"),
    }
    plain = [
        name
        for name in files
        if name.startswith("json/") or "/" not in name or name.endswith("captions.txt")
    ]
    hub = {(IMAGES, name): files[name] for name in plain if not name.startswith(("laion_", "sd_"))}
    hub |= {
        (ABU, f"abc/{name}"): files[name] for name in ("laion_text_embeddings.npy", "sd_fisher.pt")
    }
    hub[IMAGES, "laion_subset/captions.txt"] = files["laion_subset/captions.txt"]
    hub[IMAGES, "synth_train/not_wanted.7z.001"] = hub[ABU, "mscoco/not_wanted.bin"] = b"not wanted"
    for number, ((repository, name), content) in enumerate(archives.items()):
        volumes = pack(folder / str(number), content)
        hub |= {(repository, name + suffix): data for suffix, data in volumes.items()}
    return hub


def command(hub, root, **environment):
    """The arguments of a subprocess that runs the script."""
    home = root.parent / "hf_home"
    environment = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HOME": str(home),
        "NEEDED_GB": "0",
        "HF_HOME": str(home),
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_UPDATE_CHECK": "1",
        **environment,
    }
    return {
        "args": [shutil.which("bash"), str(SCRIPT), str(root)],
        "env": environment,
        "stdin": subprocess.DEVNULL,
    }


def download(hub, root, **environment):
    """Runs the script to its end."""
    return subprocess.run(
        **command(hub, root, **environment), capture_output=True, text=True, timeout=60
    )


def content_of(root):
    """What a data root holds: path -> bytes, without the script's own files."""
    paths = [path for path in root.rglob("*") if path.is_file() and ".download" not in path.parts]
    return {str(path.relative_to(root)): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def files():
    """The benchmark."""
    return benchmark_files()


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory):
    """A hub, a data root downloaded from it, and what the script said."""
    folder = tmp_path_factory.mktemp("download")
    hub = Hub(hub_files(folder, files))
    yield hub, folder / "abc", download(hub, folder / "abc")
    hub.shutdown()


@pytest.fixture
def laion_missing(whole, tmp_path):
    """A hub and a data root where the LAION subset, latents, embeddings and Fisher are still to
    come."""
    hub, whole_root, _ = whole
    root = tmp_path / "abc"
    shutil.copytree(whole_root, root)
    for name in ("laion_subset", "laion_latents.npy", "laion_text_embeddings.npy", "sd_fisher.pt"):
        shutil.rmtree(root / name) if (root / name).is_dir() else (root / name).unlink()
    for mark in (root / ".download/done").iterdir():
        if mark.name in ("everything", *LAION_GROUPS) or "laion" in mark.name:
            mark.unlink()
    hub.gets.clear()
    return hub, root


def test_a_download_gives_the_layout_whatever_folder_the_archives_begin_with(whole, files):
    _, root, result = whole
    assert result.returncode == 0, result.stderr
    assert content_of(root) == files
    assert "4 customized models with 12 images, 3 LAION images" in result.stdout
    assert f"next: python -m unlearn tasks --dataroot {root}" in result.stdout
    assert not list(root.glob(".download/*/*/*.7z*")), (
        "archives are deleted after they were extracted"
    )


def test_running_again_downloads_nothing_and_changes_nothing(whole, files):
    hub, root, _ = whole
    hub.gets.clear()
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    start = time.monotonic()
    assert download(hub, root, HF_ENDPOINT="http://127.0.0.1:9").returncode == 0
    assert time.monotonic() - start < 5
    assert not hub.gets and {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


def test_a_download_killed_while_it_transfers_is_completed_by_the_same_command(
    laion_missing, files
):
    hub, root = laion_missing
    hub.held = "abc/laion_latents.7z.001"
    hub.is_holding.clear()
    process = subprocess.Popen(
        **command(hub, root),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    assert hub.is_holding.wait(30)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    hub.held = None
    assert "laion_latents.npy" not in content_of(root)
    hub.gets.clear()
    result = download(hub, root)
    assert result.returncode == 0, result.stderr
    assert content_of(root) == files
    assert not [path for path in hub.gets if path.startswith("laion_subset/")], (
        "finished groups do not come again"
    )
    assert not list(root.rglob("*.incomplete"))


def test_an_extraction_killed_before_its_marker_is_repeated_without_harm(
    laion_missing, files, whole
):
    hub, root = laion_missing
    shutil.copytree(whole[1] / "laion_subset/images", root / "laion_subset/images")
    (root / "laion_subset/images/0.jpg").unlink()
    (root / ".download/extracting").mkdir()
    (root / ".download/extracting/half.jpg").write_bytes(b"half")
    result = download(hub, root)
    assert result.returncode == 0, result.stderr
    assert content_of(root) == files


def test_a_damaged_volume_ends_with_status_2_and_comes_anew_with_the_same_command(
    laion_missing, files
):
    hub, root = laion_missing
    volume = "laion_subset/images.7z.002"
    hub.damaged[volume] = bytes(len(hub.files[IMAGES, volume]))
    result = download(hub, root)
    assert result.returncode == 2
    assert (
        "error: laion_subset/images.7z: damaged or incomplete, its volumes were removed"
        in result.stderr
    )
    assert not (root / "laion_subset/images").exists()
    result = download(hub, root)
    assert result.returncode == 0, result.stderr
    assert content_of(root) == files


def test_a_hub_out_of_reach_ends_with_status_2_although_hf_is_content_with_a_filled_folder(
    laion_missing,
):
    hub, root = laion_missing
    stray = root / ".download/GenDataAttribution/laion_subset/captions.txt"
    stray.parent.mkdir(parents=True)
    stray.write_bytes(b"a\nb\nc\n")
    result = download(hub, root, HF_ENDPOINT="http://127.0.0.1:9")
    assert result.returncode == 2
    assert result.stderr.endswith("run the same command again to go on\n")
    assert not (root / ".download/done/LAION subset").exists()


def evil_archive(folder, member):
    """An archive with a member that would leave the target: a link's target after `->`, or a
    name."""
    link, _, target = member.partition(" -> ")
    folder.mkdir()
    (folder / "image.jpg").write_bytes(b"image")
    if target:
        (folder / link).symlink_to(target)
    subprocess.run(
        [SEVEN, "a", "-bso0", "-snl", "evil.7z", "image.jpg", *([link] if target else [])],
        cwd=folder,
        check=True,
    )
    if not target:
        subprocess.run(
            [SEVEN, "rn", "-bso0", "evil.7z", "image.jpg", member], cwd=folder, check=True
        )
    return (folder / "evil.7z").read_bytes()


@pytest.mark.parametrize(
    "member", ["../../evil.jpg", "{elsewhere}/evil.jpg", "link -> ../../outside"]
)
def test_an_archive_whose_member_would_leave_the_target_is_refused(laion_missing, tmp_path, member):
    hub, root = laion_missing
    member = member.format(elsewhere=tmp_path)
    evil = IMAGES, "laion_subset/evil.7z"
    hub.files[evil] = evil_archive(tmp_path / "evil", member)
    result = download(hub, root)
    del hub.files[evil]
    assert result.returncode == 2
    last = result.stderr.splitlines()[-1]
    assert (
        f"evil.7z: refused, nothing was extracted: member {member.partition(' -> ')[0]!r}" in last
    )
    assert not (root / "laion_subset").exists() and not list(
        (root / ".download/extracting").iterdir()
    )
    assert not list(tmp_path.rglob("evil.jpg")), "nothing was written, inside or outside"


def test_an_archive_that_would_fill_the_disk_is_refused(laion_missing, tmp_path):
    hub, root = laion_missing
    disk, content = tmp_path / "disk", tmp_path / "bomb"
    disk.mkdir()
    content.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", disk], capture_output=True
    ).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        shutil.copytree(root, disk / "abc")
        (content / "zeros.jpg").write_bytes(bytes(100 << 20))
        subprocess.run(
            [SEVEN, "a", "-bso0", "-mx1", "bomb.7z", "zeros.jpg"], cwd=content, check=True
        )
        assert (content / "bomb.7z").stat().st_size < 1 << 20
        bomb = IMAGES, "laion_subset/bomb.7z"
        hub.files[bomb] = (content / "bomb.7z").read_bytes()
        result = download(hub, disk / "abc")
        del hub.files[bomb]
        assert result.returncode == 2
        assert (
            "bomb.7z: refused, nothing was extracted: member 'zeros.jpg' and those before it "
            "would take 0.1 GB" in result.stderr
        )
        assert not list((disk / "abc/.download/extracting").iterdir())
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_a_file_of_the_users_in_the_way_is_kept_and_named(laion_missing):
    hub, root = laion_missing
    (root / "sd_fisher.pt").write_bytes(b"mine")
    result = download(hub, root)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1] == (
        f"error: {root}/sd_fisher.pt: is there and is not the benchmark's; "
        "move it away and run the same command again"
    )
    assert (root / "sd_fisher.pt").read_bytes() == b"mine"


def test_without_7z_the_script_ends_with_status_2_and_one_line(whole, tmp_path):
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("dirname", "python", "hf"):
        place = shutil.which(name, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        (programs / name).write_text(f'#!{shutil.which("bash")}\nexec {place} "$@"\n')
        (programs / name).chmod(0o755)
    result = download(whole[0], tmp_path / "abc", PATH=str(programs))
    assert result.returncode == 2
    assert (
        result.stderr
        == "error: 7z is needed: apt install 7zip, or conda install -c conda-forge p7zip\n"
    )
    assert not (tmp_path / "abc").exists()


def test_a_second_download_into_the_same_folder_is_refused(laion_missing):
    hub, root = laion_missing
    with open(root / ".download/lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        result = download(hub, root)
    assert result.returncode == 2
    assert result.stderr == f"error: {root}: another download into it is running\n"


def test_a_disk_too_small_ends_with_status_2_and_one_line(whole, tmp_path):
    result = download(whole[0], tmp_path / "abc", NEEDED_GB="100000000")
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {tmp_path}/abc: about 100000000 GB more are needed")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "name, content, expected",
    [
        (
            "laion_latents.npy",
            array_bytes(np.zeros((5, 4), "f2")),
            "expected twice as many latents as text embeddings",
        ),
        ("laion_latents.npy", b"\x93NUMPY", "not a complete .npy array"),
        (
            "laion_subset/captions.txt",
            b"a\nb\n",
            "expected as many images as captions, found 3 and 2",
        ),
        ("json/test_bamfg.json", b"[{", "not a list of customized models"),
        (
            "exemplar/bamfg/bamfg/0.png",
            None,
            "no such file (1 of the 12 that json/test_*.json names are missing)",
        ),
        ("sd_fisher.pt", None, "sd_fisher.pt: no such file"),
    ],
)
def test_the_check_at_the_end_names_what_is_wrong(whole, tmp_path, name, content, expected):
    root = tmp_path / "abc"
    shutil.copytree(whole[1], root)
    (root / name).unlink() if content is None else (root / name).write_bytes(content)
    result = download(whole[0], root)
    assert result.returncode == 2
    assert expected in result.stderr and result.stderr.count("\n") == 1
