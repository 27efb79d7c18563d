"""A folder of training images becomes a data root: the same bytes and pairs whatever its
convention, whole or not at all, and every picture under the name that people know."""

import errno
import json
import os
import shutil
import signal
import time
import traceback
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_folders import CONVENTIONS, draw, write_jsonl, write_sidecars

from unlearn import UserError
from unlearn.commands import encode
from unlearn.datasets import roots
from unlearn.datasets.captions import pair_images
from unlearn.datasets.folders import read_folder
from unlearn.datasets.originals import list_names, read_originals, write_plan
from unlearn.datasets.roots import file_name, make_data_root
from unlearn.datasets.settings import read_settings
from unlearn.datasets.training_sets import list_images, read_identity
from unlearn.storage.hashes import hash_file

EMOJI = Path(__file__).parent.parent / "data/emoji"
PIPELINE = str(EMOJI / "pipeline")
LONG = "x" * 240 + ".png"


def state(root):
    """Every file below a folder, by its bytes."""
    return {
        path.relative_to(root).as_posix(): hash_file(path)
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def make(folder, out, **settings):
    return make_data_root(read_folder(folder), out, {"pipeline": PIPELINE, **settings})


def refusal(folder, out, **settings):
    with pytest.raises(UserError) as error:
        make(folder, out, **settings)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def folder(tmp_path):
    """Four pictures with captions beside them, one in a folder and one with a long name."""
    pairs = [("a.png", "an apple"), ("b.JPG", "a bear"), ("10_c/d e.webp", "x"), (LONG, "long")]
    for number, (name, _) in enumerate(pairs):
        draw(tmp_path / "mine" / name, number)
    write_sidecars(tmp_path / "mine", pairs)
    return tmp_path / "mine"


def mixed_pictures(folder):
    """Forty pictures of the emoji world as people have them, of every kind that is read; returns
    their captions by name."""
    folder.mkdir()
    sources = sorted((EMOJI / "laion_subset/images").iterdir())[:400:10]
    captions = (EMOJI / "laion_subset/captions.txt").read_text().split("\n")[:400:10]
    turned = Image.Exif()
    turned[274] = 6
    pairs = {}
    for number, (source, caption) in enumerate(zip(sources, captions)):
        image = Image.open(source).convert("RGB").resize((96, 96))
        clear = np.asarray(image.convert("RGBA")).copy()
        clear[:8, :, 3] = 0
        kinds = {
            ".JPG": lambda path, image=image: image.save(path, "JPEG", quality=95),
            ".jpg": lambda path, image=image: image.convert("CMYK").save(path, quality=95),
            ".jpeg": lambda path, image=image: image.rotate(90).save(path, exif=turned, quality=95),
            ".png": lambda path, image=image: image.convert("P").save(path),
            ".gif": lambda path, image=image: image.save(path),
            ".webp": lambda path, image=image: image.save(path, lossless=True),
            ".tif": lambda path, image=image: image.save(path),
            ".bmp": lambda path, image=image: image.resize((200, 96)).save(path),
            ".jfif": lambda path, image=image: image.convert("L").save(path, "JPEG"),
            ".PNG": lambda path, clear=clear: Image.fromarray(clear).save(path, "PNG"),
        }
        suffix, save = list(kinds.items())[number % len(kinds)]
        name = f"{number:04d}{suffix}"
        save(folder / name)
        pairs[name] = caption
    return pairs


def test_forty_mixed_pictures_give_the_same_latents_and_embeddings_in_five_conventions(tmp_path):
    """And the same, to the bit, as a data root that a person lays out by hand."""
    pairs = mixed_pictures(tmp_path / "pictures")
    by_hand = tmp_path / "by hand"
    shutil.copytree(tmp_path / "pictures", by_hand / "laion_subset/images")
    (by_hand / "laion_subset/captions.txt").write_text("\n".join(pairs.values()) + "\n")
    (by_hand / "dataset.json").write_text(json.dumps({"name": "own", "pipeline": PIPELINE}))
    encode.main(["--dataroot", str(by_hand), "--device", "cpu"])
    expected = [np.load(by_hand / f"laion_{part}.npy") for part in ("latents", "text_embeddings")]
    assert len(expected[0]) == 80 and len(expected[1]) == 40
    identities = []
    for name in ("lines", "jsonl", "csv", "sidecars", "coco"):
        folder, out = tmp_path / name, tmp_path / f"out {name}"
        shutil.copytree(tmp_path / "pictures", folder)
        CONVENTIONS[name](folder, list(pairs.items()))
        assert make(folder, out).is_new
        encode.main(["--dataroot", str(out), "--device", "cpu"])
        for array, part in zip(expected, ("latents", "text_embeddings")):
            assert np.array_equal(np.load(out / f"laion_{part}.npy"), array)
        identities.append(read_identity(out / "laion_latents.npy"))
    assert all(identity == identities[0] for identity in identities)


def test_a_root_holds_the_users_own_bytes_under_the_users_own_names(folder, tmp_path):
    made = make(folder, tmp_path / "out")
    assert made.describe() == f"{tmp_path / 'out'}: data root of 4 pictures, made"
    paths, captions = pair_images(tmp_path / "out/images", tmp_path / "out/metadata.jsonl")
    assert list_images(tmp_path / "out") == paths
    assert captions == [["x"], ["an apple"], ["a bear"], ["long"]]
    assert list_names(tmp_path / "out", [*paths, None]) == [
        "10_c/d e.webp",
        "a.png",
        "b.JPG",
        LONG,
        None,
    ]
    for path, name in zip(paths, list_names(tmp_path / "out", paths)):
        assert os.path.samefile(path, folder / name)
    assert [path.name for path in paths[:3]] == ["d e.webp", "a.png", "b.JPG"]
    assert read_originals(tmp_path / "out")["10_c/d e.webp"].repeats == 10
    settings = read_settings(tmp_path / "out")
    assert settings["pipeline"] == PIPELINE and settings["num_captions"] == 1


def test_names_of_other_systems_stay_as_they_are(tmp_path):
    names = [unicodedata.normalize("NFD", "café.png"), "back\\slash.png", " a #?%.png", "-rf.png"]
    for name in names:
        draw(tmp_path / "mine" / name)
    write_sidecars(tmp_path / "mine", [(name, "x") for name in names])
    make(tmp_path / "mine", tmp_path / "out")
    paths, _ = pair_images(tmp_path / "out/images", tmp_path / "out/metadata.jsonl")
    assert list_names(tmp_path / "out", paths) == sorted(names)
    assert not make(tmp_path / "mine", tmp_path / "out").changes


def test_names_of_an_ordinary_root_are_its_paths():
    paths = list_images(EMOJI)
    assert list_names(EMOJI, paths[:2]) == [path.name for path in paths[:2]]


def test_long_names_stay_apart_and_fit_what_is_written_beside_them():
    names = [file_name("é" * 100 + end + ".png") for end in "ab"]
    assert len(set(names)) == 2 and all(len(name.encode()) <= 200 for name in names)
    deep = file_name("/".join(["folder"] * 200) + "/a.PNG")
    assert len(deep) < 100 and deep.endswith(".PNG")
    assert file_name("10_c/d e.webp") == "10_c/d e.webp"


def test_the_same_folder_again_changes_nothing(folder, tmp_path):
    make(folder, tmp_path / "out")
    before = state(tmp_path / "out"), (tmp_path / "out/metadata.jsonl").stat().st_mtime_ns
    made = make(folder, tmp_path / "out")
    assert not made.changes and not made.is_new and made.describe().endswith("unchanged")
    assert before == (
        state(tmp_path / "out"),
        (tmp_path / "out/metadata.jsonl").stat().st_mtime_ns,
    )


def test_a_changed_folder_is_told_and_the_root_is_as_if_made_anew(folder, tmp_path):
    make(folder, tmp_path / "out")
    draw(folder / "10_c/new.png", 9)
    (folder / "a.png").unlink()
    draw(folder / "fresh.png", 8)
    (folder / "fresh.png").replace(folder / "b.png")
    (folder / "10_c/d e.txt").write_text("y")
    draw(folder / LONG, 7)  # in place: the root's link shows it too
    made = make(folder, tmp_path / "out")
    assert made.changes == {
        "added": ["10_c/new.png", "b.png"],
        "removed": ["a.png"],
        "replaced": [LONG],
        "recaptioned": ["10_c/d e.webp"],
    }
    assert "2 added (10_c/new.png, b.png); 1 removed (a.png); 1 replaced" in made.describe()
    make(folder, tmp_path / "anew")
    now, anew = state(tmp_path / "out"), state(tmp_path / "anew")
    now.pop("originals.json"), anew.pop("originals.json")
    assert now == anew
    assert read_originals(tmp_path / "out") == read_originals(tmp_path / "anew")


def test_a_folder_that_moved_is_the_same_and_another_folder_is_refused(folder, tmp_path):
    make(folder, tmp_path / "out")
    before = state(tmp_path / "out")
    folder.rename(tmp_path / "moved")
    assert not make(tmp_path / "moved", tmp_path / "out").changes
    after = state(tmp_path / "out")
    assert {name for name in before if before[name] != after[name]} == {"originals.json"}
    draw(tmp_path / "other/z.png")
    write_sidecars(tmp_path / "other", [("z.png", "z")])
    said = refusal(tmp_path / "other", tmp_path / "out")
    assert "was made of " in said and "1 added, first z.png; give another --out" in said
    assert state(tmp_path / "out") == after


def test_what_people_add_to_dataset_json_stays_and_what_was_given_follows(folder, tmp_path):
    make(folder, tmp_path / "out", resolution=64)
    path = tmp_path / "out/dataset.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "top_k": 3}))
    make(folder, tmp_path / "out", damping=0.5)
    settings = json.loads(path.read_text())
    assert settings["top_k"] == 3 and settings["damping"] == 0.5 and "resolution" not in settings


def test_folders_that_are_not_this_programs_are_refused_and_left_as_they_are(folder, tmp_path):
    assert "holds the pictures" in refusal(folder, folder)
    shutil.copytree(EMOJI / "json", tmp_path / "own/json")
    (tmp_path / "own/dataset.json").write_text("{}")
    assert "has dataset.json, which was not made of a folder" in refusal(folder, tmp_path / "own")
    (tmp_path / "file").write_text("")
    assert "found a file" in refusal(folder, tmp_path / "file")
    assert "learn_rate" in refusal(folder, tmp_path / "new", learn_rate=1)
    assert "resolution -1" in refusal(folder, tmp_path / "new", resolution=-1)
    assert not (tmp_path / "new").exists()
    make(folder, tmp_path / "out")
    draw(tmp_path / "out/images/mine.png")
    (tmp_path / "out/images/.DS_Store").write_bytes(b"x")
    before = state(tmp_path / "out")
    assert "1 pictures did not come from" in refusal(folder, tmp_path / "out")
    assert state(tmp_path / "out") == before
    (tmp_path / "out/images/mine.png").unlink()
    assert not make(folder, tmp_path / "out").changes


def test_a_root_inside_of_the_folder_is_not_read_as_its_pictures(folder):
    make(folder, folder / "out")
    found = read_folder(folder)
    assert len(found.entries) == 4
    assert found.skipped == {"a data root that was made of a folder": ["out"]}
    assert not make(folder, folder / "out").changes


def test_where_no_link_can_be_made_the_bytes_are_copied(folder, tmp_path, monkeypatch):
    def refuse(*args, **more):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    make(folder, tmp_path / "linked")
    monkeypatch.setattr(os, "link", refuse)
    make(folder, tmp_path / "copied")
    assert not make(folder, tmp_path / "copied").changes
    linked, copied = state(tmp_path / "linked"), state(tmp_path / "copied")
    assert linked == copied
    assert not os.path.samefile(tmp_path / "copied/images/a.png", folder / "a.png")


def test_a_link_to_a_picture_becomes_the_picture(tmp_path):
    draw(tmp_path / "blobs/1.png")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/a.png").symlink_to("../blobs/1.png")
    write_jsonl(tmp_path / "mine", [("a.png", "x")])
    make(tmp_path / "mine", tmp_path / "out")
    assert not (tmp_path / "out/images/a.png").is_symlink()
    assert pair_images(tmp_path / "out/images", tmp_path / "out/metadata.jsonl")[1] == [["x"]]


def test_pictures_with_several_captions_share_the_fewest(tmp_path):
    for name in "a.png", "b.png":
        draw(tmp_path / "mine" / name)
    pairs = [("a.png", "1"), ("a.png", "2"), ("a.png", "3"), ("b.png", "1"), ("b.png", "2")]
    write_jsonl(tmp_path / "mine", pairs)
    make(tmp_path / "mine", tmp_path / "out")
    settings = read_settings(tmp_path / "out")
    paths = tmp_path / "out/images", tmp_path / "out/metadata.jsonl"
    assert pair_images(*paths, settings["num_captions"])[1] == [["1", "2"], ["1", "2"]]


OPERATIONS = ("link", "replace", "unlink", "mkdir", "rmdir", "open")


def run_killed_at(step, work):
    """Runs `work` in a child that dies without a word before its file operation number `step`;
    returns whether it finished before."""
    child = os.fork()
    if child == 0:
        count = 0

        def counted(function):
            def call(*args, **more):
                nonlocal count
                count += 1
                if count > step:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **more)

            return call

        for name in OPERATIONS:
            setattr(os, name, counted(getattr(os, name)))
        try:
            work()
        finally:
            os._exit(0)
    return os.WIFEXITED(os.waitpid(child, 0)[1])


def read_root(out):
    """What a command reads of a root: pictures' bytes and captions; None where it refuses."""
    try:
        paths, captions = pair_images(out / "images", out / "metadata.jsonl")
    except UserError:
        return None
    return [(path.name, hash_file(path), lines) for path, lines in zip(paths, captions)]


@pytest.mark.parametrize("is_update", [False, True], ids=["first", "update"])
def test_killed_at_any_moment_it_goes_on_and_no_mixture_of_two_states_can_be_read(
    is_update, tmp_path
):
    folder, pairs = tmp_path / "mine", [("a.png", "1"), ("b/c.png", "2"), ("d.png", "3")]
    for number, (name, _) in enumerate(pairs):
        draw(folder / name, number)
    write_jsonl(folder, pairs)
    old = tmp_path / "old"
    if is_update:
        make(folder, old)
        (folder / "b/c.png").unlink()
        draw(folder / "new.png", 4)
        (folder / "new.png").replace(folder / "a.png")
        draw(folder / "e/f.png", 5)
        write_jsonl(folder, [("a.png", "1"), ("d.png", "changed"), ("e/f.png", "4")])
    make(folder, tmp_path / "anew")
    allowed = [None, read_root(old), read_root(tmp_path / "anew")]
    finished, step = False, 0
    while not finished:
        out = tmp_path / f"out {step}"
        if is_update:
            shutil.copytree(old, out)
        finished = run_killed_at(step, lambda out=out: make(folder, out))
        assert read_root(out) in allowed
        make(folder, out)
        assert read_root(out) == allowed[2]
        now, anew = state(out), state(tmp_path / "anew")
        assert now.keys() == anew.keys()  # nothing half-written is left
        assert read_originals(out) == read_originals(tmp_path / "anew")
        step += 1
    assert step > 15


def run_together(*works):
    """How each of some pieces of work, run at the same moment, ended: 0 well, 1 with a UserError, 2
    with another error. Errors are printed, so that a test that fails by them shows them."""
    children = []
    for work in works:
        children.append(os.fork())
        if children[-1] == 0:
            code = 2
            try:
                work()
                code = 0
            except BaseException as error:
                code = 1 if isinstance(error, UserError) else 2
                os.write(2, traceback.format_exc().encode(errors="replace"))
            finally:
                os._exit(code)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def test_runs_at_the_same_moment_make_one_root_of_one_folder(folder, tmp_path, monkeypatch):
    def write_late(*args):
        time.sleep(0.3)  # so that all have seen an empty folder by then
        write_plan(*args)

    monkeypatch.setattr(roots, "write_plan", write_late)
    make(folder, tmp_path / "alone")
    other = tmp_path / "other"
    draw(other / "z.png")
    write_jsonl(other, [("z.png", "z")])
    for number in range(2):
        out = tmp_path / f"same {number}"
        assert run_together(*[lambda out=out: make(folder, out)] * 4) == [0] * 4
        assert state(out) == state(tmp_path / "alone")
        out = tmp_path / f"different {number}"
        codes = run_together(lambda out=out: make(folder, out), lambda out=out: make(other, out))
        assert sorted(codes) == [0, 1]
        assert len(read_root(out)) == (4 if codes[0] == 0 else 1)


@pytest.mark.parametrize(
    "content", ["[]", "{}", '{"folder": 1, "settings": {}, "pictures": [], "stale": []}', "{"]
)
def test_a_damaged_originals_file_is_refused(content, folder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/originals.json").write_text(content)
    assert "originals.json" in refusal(folder, tmp_path / "out")
