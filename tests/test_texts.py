"""Texts that stand on the disk once: their index, what an earlier version wrote, and what was damaged.
That each family's texts are given bit by bit stands in test_families."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_families import CAPTIONS, make_pipeline, make_root

import unlearn
from unlearn import UserError
from unlearn.commands import examination
from unlearn.datasets import encoding, text_files
from unlearn.datasets.encoding import encode_training_set, encoding_plan
from unlearn.datasets.own_root import own_root
from unlearn.datasets.texts import Packed, Texts, halve, make_index, widen
from unlearn.datasets.training_sets import open_arrays, open_extras
from unlearn.front.needs import find_needs
from unlearn.front.planning import count_work
from unlearn.models.architectures import read_architecture
from unlearn.models.pipelines import load_model

STATES, INDEX, LATENTS = (
    f"laion_{name}.npy" for name in ("text_embeddings", "text_embeddings_index", "latents")
)
LINES = [CAPTIONS[0], CAPTIONS[2], CAPTIONS[0], CAPTIONS[3]]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zimage") / "pipeline"
    make_pipeline("zimage").save_pretrained(folder)
    return load_model(folder, "cpu")


def new_root(model, folder, lines=LINES, **settings):
    """A data root of four images with these captions, that nobody encoded yet."""
    root = make_root(folder, model.pipeline.name_or_path, vae_batch_size=1, **settings)
    (root / "laion_subset/captions.txt").write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture(scope="module")
def encoded(model, tmp_path_factory):
    root = new_root(model, tmp_path_factory.mktemp("encoded") / "root")
    unlearn.open_training_set(root, model)
    return root


@pytest.fixture
def root(encoded, tmp_path):
    return shutil.copytree(encoded, tmp_path / "root")


def arrays_of(root):
    """Bytes of what is encoded of a data root, and of the records' identities, by file."""
    found = {path.name: path.read_bytes() for path in sorted(root.glob("laion_*.npy"))}
    for path in sorted(root.glob("laion_*.json")):
        found[path.name] = json.loads(path.read_text())["identity"]
    return found


@pytest.fixture
def no_encoder(monkeypatch):
    """Whatever is encoded fails."""
    monkeypatch.setattr(text_files, "encode_prompts", None)
    monkeypatch.setattr(encoding, "encode_images", None)


def make_texts():
    """Three texts of 2, 0 and 3 tokens of 4, which five images with two captions each have; and the
    array that they stand for."""
    numbers = np.array([[0, 1], [1, 1], [2, 0], [0, 2], [2, 2]])
    rows = np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32)
    whole = np.zeros((3, 4, 3), np.float32)
    whole[0, :2], whole[2, :3] = rows[:2], rows[2:]
    return Packed(rows, make_index(numbers, [2, 0, 3], 4), (4, 3)), whole[numbers]


@pytest.mark.parametrize(
    "key",
    [
        2,
        (3, 1),
        slice(1, 4),
        (slice(None), 0),
        (slice(1, 3), slice(0, 1)),
        [4, 0, 4],
        ([1, 2], [0, 1]),
        (np.array([3, 0]), slice(None)),
        np.array([True, False, False, True, False]),
        slice(0, 0),
    ],
    ids=str,
)
def test_texts_are_asked_for_as_the_array_that_they_stand_for(key):
    texts, whole = make_texts()
    assert texts.shape == whole.shape and len(texts) == len(whole) and texts.ndim == whole.ndim
    assert np.array_equal(texts[key], whole[key]) and texts[key].dtype == np.float32
    assert np.array_equal(np.asarray(texts), whole)
    if not isinstance(key, (int, tuple)):
        assert np.array_equal(np.asarray(texts.choose(key)), whole[key])


def test_what_belongs_to_a_text_is_found_by_its_number():
    texts, _ = make_texts()
    pooled = np.arange(6, dtype=np.float32).reshape(3, 2)
    found = Texts(pooled, texts.index, (2,))
    assert np.array_equal(found[[2, 0]], pooled[texts.index[[2, 0], :, 0]])
    for key in ((0, 0, 0), (Ellipsis, 0), None):
        with pytest.raises(IndexError, match="by image and caption alone"):
            texts[key]


def test_every_number_of_bfloat16_comes_back_with_its_bits_and_no_other_is_rounded():
    every = np.arange(1 << 16, dtype=np.uint16)
    wide = widen(every)
    assert np.array_equal(halve(wide), every)
    back = torch.from_numpy(every.view(np.int16)).view(torch.bfloat16).float().numpy()
    assert np.array_equal(wide.view(np.int32), back.view(np.int32))
    assert halve(np.array([1, 1 + 2**-12], np.float32)) is None


@pytest.mark.parametrize("calls", range(4))
def test_texts_that_were_killed_go_on_to_the_same_bytes(
    calls, model, encoded, tmp_path, monkeypatch
):
    root, seen, real = new_root(model, tmp_path / "root"), [], text_files.encode_prompts

    def killed(encoder, lines):
        if len(seen) == calls:
            raise KeyboardInterrupt
        seen.append(lines)
        return real(encoder, lines)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(text_files, "encode_prompts", killed)
        unlearn.open_training_set(root, model)
    again = []
    monkeypatch.setattr(
        text_files, "encode_prompts", lambda *how: again.append(how[1]) or real(*how)
    )
    unlearn.open_training_set(root, model)
    assert arrays_of(root) == arrays_of(encoded) and not list(root.glob("*.part"))
    assert len(again) == 6 - calls, "three different captions, for states and mask"


def test_a_file_of_an_earlier_version_is_read_and_gives_the_same(
    model, encoded, tmp_path, monkeypatch
):
    root = new_root(model, tmp_path / "root")
    with monkeypatch.context() as patch:
        patch.setattr(type(model.family), "is_stored_by_image", True)
        old = unlearn.open_training_set(root, model)
    assert np.load(root / STATES).shape == (4, *model.embedding_shape)
    assert not (root / INDEX).exists()
    before, new = arrays_of(root), unlearn.open_training_set(encoded, model)
    with monkeypatch.context() as patch:
        patch.setattr(text_files, "encode_prompts", None)
        assert unlearn.open_training_set(root, model).identity == old.identity == new.identity
        assert arrays_of(root) == before
    for name, told in old.conditioning.items():
        np.testing.assert_allclose(np.asarray(told), np.asarray(new.conditioning[name]), atol=1e-5)
    settings = {"resolution": 16, "batch_size": 1}
    encode_training_set(model, root, **settings, overwrite=True)
    assert arrays_of(root) == arrays_of(encoded)


def test_an_index_that_was_damaged_or_lost_is_made_again_without_the_rest(
    model, encoded, root, no_encoder
):
    for damage in (lambda path: path.unlink(), lambda path: path.write_bytes(b"no array")):
        damage(root / INDEX)
        unlearn.open_training_set(root, model)
        assert arrays_of(root) == arrays_of(encoded)
    index = np.load(root / INDEX)
    index[0] = index[1]
    np.save(root / INDEX, index)
    unlearn.open_training_set(root, model)
    assert arrays_of(root) == arrays_of(encoded)


def damage_values(root):
    index = np.load(root / INDEX)
    index[[0, 1]] = index[[1, 0]]
    np.save(root / INDEX, index)


def damage_record(root):
    path = (root / INDEX).with_suffix(".json")
    record = json.loads(path.read_text())
    record["identity"]["captions"] = "0" * 32
    path.write_text(json.dumps(record))


def without_records(change):
    """Changes an index where nothing says how it was made."""

    def damage(root):
        for path in root.glob("laion_*.json"):
            path.unlink()
        np.save(root / INDEX, change(np.load(root / INDEX)))

    return damage


DAMAGED = {
    "values": (damage_values, "its content is not what its record says"),
    "record": (damage_record, f"{INDEX}: was not made with {STATES}; remove it"),
    "gone": (lambda root: (root / INDEX).unlink(), f"{INDEX}: no such file; encode"),
    "shorter rows": (without_records(lambda index: index - [0, 0, 1, 0]), "is no index of"),
    "beyond the end": (without_records(lambda index: index + [0, 1, 0, 0]), "is no index of"),
    "of floats": (without_records(lambda index: index.astype(float)), "is no index of"),
    "without columns": (without_records(lambda index: index[..., 0]), "is no index of"),
    "a text that is not there": (without_records(lambda index: index + [1, 0, 0, 0]), "no index"),
}


@pytest.mark.parametrize("damage, words", DAMAGED.values(), ids=DAMAGED)
def test_an_index_that_does_not_fit_is_refused(root, damage, words):
    damage(root)
    with pytest.raises(UserError, match=words):
        open_arrays(root)


def test_what_belongs_to_texts_and_is_no_number_is_refused(root):
    path = root / STATES.replace(".npy", "_mask.npy")
    embeddings = open_arrays(root)[1]
    for kind in "U3", complex:
        np.save(path, np.ones((4, 16)).astype(kind))
        with pytest.raises(UserError, match=f"{path.name}: expected numbers, found"):
            open_extras(root, {"mask": (16,)}, embeddings)


def test_texts_of_which_half_precision_would_lose_bits_stay_in_float32(
    model, encoded, tmp_path, monkeypatch
):
    monkeypatch.setattr(type(model), "has_half_texts", True)
    root = new_root(model, tmp_path / "root")
    unlearn.open_training_set(root, model)
    assert arrays_of(root) == arrays_of(encoded)


def test_states_of_more_tokens_than_are_read_are_refused(model, tmp_path, monkeypatch):
    monkeypatch.setattr(type(model), "text_lengths", lambda self, lines: [3] * len(lines))
    with pytest.raises(UserError, match="more tokens than the tokenizer reads"):
        unlearn.open_training_set(new_root(model, tmp_path / "root"), model)


def test_images_with_several_captions_have_each_of_them(model, tmp_path):
    root = new_root(model, tmp_path / "root", captions="laion_subset/metadata.jsonl")
    few = [[LINES[row], LINES[(row + 1) % 4]] for row in range(4)]
    names = sorted(path.name for path in (root / "laion_subset/images").iterdir())
    (root / "laion_subset/metadata.jsonl").write_text(
        "".join(
            json.dumps({"file_name": name, "text": lines}) + "\n" for name, lines in zip(names, few)
        )
    )
    images = unlearn.open_training_set(root, model)
    assert images.embeddings.shape == (4, 2, *model.embedding_shape)
    for row, lines in enumerate(few):
        for name, tensor in model.encode_prompts(lines).items():
            np.testing.assert_allclose(images.texts(row)[name], tensor, atol=1e-5)
    assert len(np.load(root / STATES)) == sum(model.text_lengths(list(dict.fromkeys(LINES))))


def test_what_is_predicted_of_the_disk_is_what_is_written(model, encoded):
    plan = encoding_plan(model, encoded, [[line] for line in LINES], 16)
    for path, size in plan.items():
        assert path.stat().st_size == size + 128, path
    assert plan.keys() == set(encoded.glob("laion_*.npy"))
    many = encoding_plan(model, encoded, [[line] for line in LINES * 100], 16)
    grown = {path.name for path in plan if many[path] > plan[path]}
    assert grown == {LATENTS, INDEX}


def test_a_full_disk_is_told_before_anything_is_encoded(model, tmp_path, monkeypatch, no_encoder):
    root = new_root(model, tmp_path / "root")
    needed = sum(encoding_plan(model, root, [[line] for line in LINES], 16).values())
    for free, words in ((needed - 1, "need 0.0 GB more, 0.0 GB are free"), (needed, None)):
        usage = shutil.disk_usage(root)._replace(free=free)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
        with pytest.raises(UserError if words else TypeError, match=words):
            unlearn.open_training_set(root, model)


def test_what_a_run_takes_is_told_by_the_different_captions(model, encoded, tmp_path):
    entries = [SimpleNamespace(captions=[line]) for line in LINES]
    found = SimpleNamespace(entries=entries)
    counts = count_work(found, model, tmp_path, [], None, None, "exact")
    assert counts.captions == 4 and counts.texts == 3
    told = sum(path.stat().st_size - 128 for path in encoded.glob(f"{STATES[:-4]}*.npy"))
    assert counts.text_bytes == told
    own, half = (
        find_needs(read_architecture(model.pipeline.name_or_path), 16, weights=weights)
        for weights in ("fp32", "bf16")
    )
    states, mask = (np.prod(shape) for shape in model.conditioning_shapes.values())
    assert own.caption_bytes == 4 * (states + mask)
    assert half.caption_bytes == own.caption_bytes - 2 * states
    assert own.disk(9, 5) - own.disk(9, 1) == 4 * own.caption_bytes


def test_doctor_and_the_commands_for_a_root_of_one_s_own_know_the_index(encoded, model):
    assert INDEX not in own_root(encoded)
    examination.check_shapes(encoded, model.parts, 16)
