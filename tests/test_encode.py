"""`python -m unlearn encode`: images and captions become latents and embeddings, row by row,
whatever interrupts it."""

import errno
import json
import os
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from coco_miniature import NUM_IMAGES, build_miniature
from conftest import resolved
from PIL import Image
from test_bad_input import files, refused

from unlearn import UserError
from unlearn.commands import encode, examination, machine
from unlearn.commands.inputs import find_fisher, prepare_training_set
from unlearn.datasets import encoding, own_root, pairs, text_files
from unlearn.datasets.annotations import read_coco, read_metadata
from unlearn.datasets.captions import pair_images
from unlearn.datasets.encoders import encode_images, encode_prompts, load_image
from unlearn.datasets.pictures import hash_picture
from unlearn.datasets.preparation import count_images
from unlearn.datasets.settings import read_settings
from unlearn.datasets.training_sets import list_images, open_training_set
from unlearn.models.pipelines import load_model
from unlearn.storage.hashes import digest, digest_rows, hash_file, hash_tensors, named_weights
from unlearn.storage.reading import read_json
from unlearn.storage.records import record_path

LATENTS = "coco17_train_latents.npy"
EMBEDDINGS = "coco17_train_text_embeddings.npy"
CAPTIONS = "annotations/captions_train2017.json"


@pytest.fixture(scope="module")
def miniature(tmp_path_factory):
    """The COCO miniature as it is downloaded, without arrays."""
    return build_miniature(tmp_path_factory.mktemp("miniature") / "mscoco")


@pytest.fixture(scope="module")
def model(miniature):
    """Its model, loaded once."""
    return load_model(str(miniature / "pipeline"), "cpu", str(miniature / "unet"))


@pytest.fixture(scope="module")
def encoded(miniature, model, tmp_path_factory):
    """A copy that was encoded without interruption."""
    root = shutil.copytree(miniature, tmp_path_factory.mktemp("encoded") / "mscoco", symlinks=True)
    encoding.encode_training_set(model, root, 128, 5)
    return root


@pytest.fixture
def coco(miniature, tmp_path):
    """A private copy without arrays."""
    return Path(shutil.copytree(miniature, tmp_path / "mscoco", symlinks=True))


@pytest.fixture
def folder(coco):
    """A private folder of three images with a metadata.jsonl that lists them in another order than
    their names'."""
    entries = [
        {"file_name": "b/2.png", "text": ["a cat", "the cat"]},
        {"file_name": "1.png", "text": ["a dog", "the dog"]},
        {"file_name": "./3.jpg", "text": ["a bus", "the bus"]},
    ]
    for entry in entries:
        path = coco / "pictures" / entry["file_name"]
        path.parent.mkdir(exist_ok=True, parents=True)
        Image.new(
            "RGB",
            (40, 30),
            f"#{len(entry['text'][0]) * 30:02x}{path.stat().st_size if path.exists() else 90:02x}40",
        ).save(path)
    write_lines(coco, entries)
    (coco / "dataset.json").write_text(
        json.dumps(
            {
                "name": "mine",
                "pipeline": "pipeline",
                "resolution": 128,
                "images": "pictures",
                "captions": "pictures/metadata.jsonl",
            }
        )
    )
    return coco


def write_lines(root, entries):
    """Writes pictures/metadata.jsonl."""
    (root / "pictures/metadata.jsonl").write_text(
        "".join(json.dumps(entry) + "\n" for entry in entries)
    )


def run(monkeypatch, model, root, *flags):
    """Runs the command in this process with a model that is loaded already."""
    monkeypatch.setattr(encode, "load_model", lambda *where, **more: model)
    encode.main(["--dataroot", str(root), "--device", "cpu", "--vae_batch_size", "5", *flags])


def made(root):
    """The bytes of both arrays and the identities in their records."""
    return [
        ((root / name).read_bytes(), read_json(record_path(root / name))["identity"])
        for name in (LATENTS, EMBEDDINGS)
    ]


def captions_of(content, number):
    """The annotations of one image."""
    return [
        entry
        for entry in content["annotations"]
        if entry["image_id"] == content["images"][number]["id"]
    ]


def edit_annotations(root, change):
    """Changes the annotation file in place."""
    content = json.loads((root / CAPTIONS).read_text())
    change(content)
    (root / CAPTIONS).write_text(json.dumps(content))


def test_a_row_is_an_entry_of_images_with_its_first_five_captions_by_id(miniature):
    content = json.loads((miniature / CAPTIONS).read_text())
    paths, captions = pair_images(miniature / "train2017", miniature / CAPTIONS)
    assert (
        [path.name for path in paths]
        == [image["file_name"] for image in content["images"]]
        != sorted(path.name for path in paths)
    )
    for image, found in zip(content["images"], captions):
        own = {
            entry["id"]: entry["caption"]
            for entry in content["annotations"]
            if entry["image_id"] == image["id"]
        }
        assert found == [own[id] for id in sorted(own)][:5] and len(own) in (5, 6)
    assert any(len(found) == 6 for _, found in read_coco(miniature / CAPTIONS)), (
        "an image with more than five is fine"
    )


def test_latents_are_both_views_of_every_image_and_embeddings_every_caption(encoded, model):
    paths, captions = pair_images(encoded / "train2017", encoded / CAPTIONS)
    training_set = open_training_set(encoded, "mscoco", (4, 4, 4), {"embeddings": (77, 32)})
    assert np.load(encoded / LATENTS).shape == (
        2 * NUM_IMAGES,
        4,
        4,
        4,
    ) and training_set.embeddings.shape == (NUM_IMAGES, 5, 77, 32)
    for row in 0, 7, NUM_IMAGES - 1:
        for view in 0, 1:
            expected = encode_images(model, [paths[row]], 128, bool(view))[0].numpy()
            np.testing.assert_allclose(training_set.latents[view, row], expected, atol=1e-5)
        np.testing.assert_allclose(
            training_set.embeddings[row],
            encode_prompts(model, captions[row])["embeddings"],
            atol=1e-5,
        )
    assert training_set.paths == paths and training_set.captions == [
        first for first, *_ in captions
    ]
    assert len({training_set.latents[0, row].tobytes() for row in range(NUM_IMAGES)}) == NUM_IMAGES
    assert training_set.ids[3] == "laion/000003"


@pytest.mark.parametrize("calls", [0, 1, 5, 9])
def test_an_encoding_killed_at_any_batch_goes_on_there_and_gives_the_same_bits(
    calls, encoded, coco, model, monkeypatch
):
    done, real = [], encoding.encode_images

    def interrupted(pipeline, paths, *how):
        if len(done) == calls:
            raise KeyboardInterrupt
        done.append(paths)
        return real(pipeline, paths, *how)

    monkeypatch.setattr(encoding, "encode_images", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, model, coco)
    assert not (coco / LATENTS).exists() and not record_path(coco / LATENTS).exists()
    [part] = coco.glob("*.part")
    part.write_bytes(
        part.read_bytes()[: -7 if calls else None]
    )  # killed within a write: that batch is made again
    again = []
    monkeypatch.setattr(encoding, "encode_images", lambda *how: again.append(how) or real(*how))
    run(monkeypatch, model, coco)
    assert made(coco) == made(encoded) and not list(coco.glob("*.part"))
    assert len(again) == 10 - max(0, calls - 1), "batches that were finished are not made again"


def test_rows_that_a_lost_node_left_as_zeros_are_made_again(encoded, coco, model, monkeypatch):
    real = encoding.encode_images
    monkeypatch.setattr(text_files, "encode_prompts", None)
    monkeypatch.setattr(encoding, "encode_images", lambda *how: real(*how))
    whole = (encoded / LATENTS).read_bytes()
    monkeypatch.setattr(
        os, "replace", lambda source, target: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, model, coco)
    monkeypatch.undo()
    [part] = coco.glob(f"{LATENTS}.*.part")
    assert part.read_bytes() == whole
    part.write_bytes(whole[: len(whole) // 2] + bytes(len(whole) - len(whole) // 2))
    run(monkeypatch, model, coco)
    assert made(coco) == made(encoded)


def test_a_kill_before_the_last_rename_never_leaves_an_old_array_with_a_new_record(
    encoded, tmp_path, model, monkeypatch
):
    root = shutil.copytree(encoded, tmp_path / "mscoco", symlinks=True)
    first, old, replace = list_images(root)[0], made(root), os.replace
    Image.new("RGB", (40, 40), "red").save(first)

    def killed(source, target):
        if Path(target).name == LATENTS:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, model, root)
    assert not (root / LATENTS).exists() and record_path(root / LATENTS).exists()
    monkeypatch.undo()
    monkeypatch.setattr(encoding, "encode_images", None)  # all rows are there
    run(monkeypatch, model, root)
    assert made(root)[0] != old[0] and read_json(record_path(root / LATENTS))[
        "content"
    ] == hash_file(root / LATENTS)
    assert made(root)[1][0] == old[1][0] and not list(root.glob("*.part"))


def test_an_encoding_killed_between_both_arrays_keeps_the_first(encoded, coco, model, monkeypatch):
    monkeypatch.setattr(text_files, "encode_prompts", None)
    with pytest.raises(TypeError):
        run(monkeypatch, model, coco)
    monkeypatch.undo()
    monkeypatch.setattr(encoding, "encode_images", None)
    run(monkeypatch, model, coco)
    assert made(coco) == made(encoded)


def test_what_is_encoded_already_is_not_made_again_and_the_scripts_take_it(
    encoded, model, monkeypatch, caplog
):
    before = files(encoded)
    monkeypatch.setattr(encoding, "encode_images", None)
    with caplog.at_level("INFO", "unlearn"):
        run(monkeypatch, model, encoded)
    assert "are there already" in caplog.text
    args = SimpleNamespace(dataroot=str(encoded), sd_version=None, device="cpu")
    assert (
        len(prepare_training_set(model, resolved(args))) == NUM_IMAGES and files(encoded) == before
    )


def test_the_scripts_first_use_makes_what_the_command_makes(encoded, coco, model):
    args = SimpleNamespace(dataroot=str(coco), sd_version=None, device="cpu", vae_batch_size=5)
    prepare_training_set(model, resolved(args))
    assert made(coco) == made(encoded)


def test_no_more_than_a_batch_is_ever_held(coco, model, monkeypatch):
    sizes, images, prompts = [], encoding.encode_images, text_files.encode_prompts
    monkeypatch.setattr(
        encoding,
        "encode_images",
        lambda pipeline, paths, *how: sizes.append(len(paths)) or images(pipeline, paths, *how),
    )
    monkeypatch.setattr(
        text_files,
        "encode_prompts",
        lambda pipeline, lines: sizes.append(len(lines) / 5) or prompts(pipeline, lines),
    )
    run(monkeypatch, model, coco)
    assert max(sizes) == 5 and sum(sizes) == 3 * NUM_IMAGES


def damage(root):
    """Damages three images of the miniature; returns their rows."""
    paths, _ = pair_images(root / "train2017", root / CAPTIONS)
    paths[2].write_bytes(paths[2].read_bytes()[:200])
    paths[9].write_bytes(b"<html>404</html>")
    paths[23].write_bytes(b"")
    return [2, 9, 23]


def test_corrupt_images_are_counted_and_named_before_anything_is_made(coco, model, monkeypatch):
    rows, paths = damage(coco), pair_images(coco / "train2017", coco / CAPTIONS)[0]
    before = files(coco)
    monkeypatch.setattr(encoding, "encode_images", None)
    with pytest.raises(UserError) as error:
        run(monkeypatch, model, coco)
    assert str(error.value).startswith(
        f"3 of 24 images cannot be read: image {paths[2]}: cannot be read"
    )
    assert (
        f"; next {paths[9].name}, {paths[23].name}; replace them, or leave them out: python -m "
        f"unlearn encode" in str(error.value)
    )
    assert str(error.value).endswith("--skip_corrupt") and rows and files(coco) == before


def test_images_that_are_left_out_are_named_and_counted_nowhere(coco, model, monkeypatch, caplog):
    paths, rows = pair_images(coco / "train2017", coco / CAPTIONS)[0], damage(coco)
    paths[0].write_bytes(b"")
    with caplog.at_level("INFO", "unlearn"):
        run(monkeypatch, model, coco, "--skip_corrupt")
    names = ", ".join(paths[row].name for row in (0, *rows))
    assert f"4 of 24 training images cannot be read and are left out: {names}" in caplog.messages
    assert f"{paths[0].name} ->" not in caplog.text and f"{paths[1].name} ->" in caplog.text
    assert count_images(coco) == NUM_IMAGES - 4
    [finding, *_], _ = examination.examine_data(
        SimpleNamespace(dataroot=str(coco), sd_version=None, fisher_path=None, lora=[])
    )
    assert finding.text == "20 training images (4 left out, which cannot be read), encoded"
    Image.new("RGB", (40, 40)).save(paths[0])
    assert count_images(coco) == NUM_IMAGES - 3, "it will be encoded at the next use"


def test_corrupt_images_may_be_left_out_and_every_other_row_keeps_its_id_and_captions(
    coco, encoded, model, monkeypatch
):
    rows = damage(coco)
    run(monkeypatch, model, coco, "--skip_corrupt")
    whole, rest = (
        open_training_set(root, "mscoco", (4, 4, 4), {"embeddings": (77, 32)})
        for root in (encoded, coco)
    )
    kept = [row for row in range(NUM_IMAGES) if row not in rows]
    assert rest.ids == [whole.ids[row] for row in kept] and rest.captions == [
        whole.captions[row] for row in kept
    ]
    assert (
        [path.name for path in rest.paths]
        == [whole.paths[row].name for row in kept]
        == [path.name for path in list_images(coco)]
    )
    np.testing.assert_allclose(rest.latents, whole.latents[:, kept], atol=1e-5)
    np.testing.assert_allclose(rest.embeddings, whole.embeddings[kept], atol=1e-5)
    assert made(coco)[0][1]["left_out"] == [whole.paths[row].name for row in rows]
    monkeypatch.setattr(encoding, "encode_images", None)
    args = SimpleNamespace(dataroot=str(coco), sd_version=None, device="cpu")
    assert len(prepare_training_set(model, resolved(args))) == NUM_IMAGES - 3, (
        "the scripts need no flag for it"
    )


@pytest.mark.parametrize(
    "change, said",
    [
        (
            lambda content: content["images"].pop(),
            ["5 captions without images, first annotation ", "which `images` does not list"],
        ),
        (
            lambda content: content["images"].append({"id": 1, "file_name": "new.jpg"}),
            ["1 of 25 captions without images: not in", "first new.jpg"],
        ),
        (
            lambda content: [
                content["annotations"].remove(entry) for entry in captions_of(content, 4)
            ],
            ["1 of 24 images without captions, first"],
        ),
        (
            lambda content: content["annotations"].remove(captions_of(content, 3)[0]),
            [
                "has 4 captions, expected 5 as of every image; take the first 4 of each: write "
                '"num_captions": 4 into the data root\'s dataset.json'
            ],
        ),
        (
            lambda content: content["images"][0].update(file_name="../../etc/passwd"),
            ["expected names of files below the folder", "../../etc/passwd"],
        ),
        (
            lambda content: content["images"][0].update(file_name="/etc/passwd"),
            ["expected names of files below the folder of images"],
        ),
        (
            lambda content: content["images"][1].update(
                file_name=content["images"][0]["file_name"]
            ),
            ["stands there twice"],
        ),
        (
            lambda content: content["images"][1].update(id=content["images"][0]["id"]),
            ["images, entry 1: id", "stands there twice"],
        ),
        (
            lambda content: content["annotations"][2].update(caption=None),
            ["annotations, entry 2: caption: expected str, found None"],
        ),
        (
            lambda content: content["annotations"][2].update(id="7"),
            ["annotations, entry 2: id: expected int, found '7'"],
        ),
        (
            lambda content: content.pop("annotations"),
            [
                "expected COCO's caption annotations, an object with a list `annotations`, found "
                "NoneType"
            ],
        ),
        (lambda content: content.update(images={}), ["an object with a list `images`, found dict"]),
        (lambda content: content.update(images=[], annotations=[]), ["lists no image"]),
    ],
)
def test_an_annotation_file_that_does_not_fit_is_named_with_what_is_wrong(
    change, said, coco, model, monkeypatch, capsys
):
    edit_annotations(coco, change)
    before = files(coco)
    monkeypatch.setattr(encode, "load_model", None)  # told before a model is loaded
    line = refused(capsys, encode.main, ["--dataroot", str(coco), "--device", "cpu"])
    assert "captions_train2017.json: " in line and all(text in line for text in said), line
    assert files(coco) == before


def test_images_that_no_caption_names_are_counted_and_the_first_is_named(coco, capsys):
    for name in "zebra.jpg", "ant.png":
        Image.new("RGB", (40, 30)).save(coco / "train2017" / name)
    line = refused(capsys, encode.main, ["--dataroot", str(coco), "--device", "cpu"])
    assert (
        f"{coco}/train2017: 2 of 26 images without captions in captions_train2017.json, first "
        f"ant.png" in line
    )


def test_fewer_captions_are_taken_where_they_are_asked_for_and_remembered(
    coco, encoded, model, monkeypatch
):
    edit_annotations(
        coco, lambda content: content["annotations"].remove(captions_of(content, 3)[0])
    )
    run(monkeypatch, model, coco, "--num_captions", "2")
    embeddings = np.load(coco / EMBEDDINGS)
    assert embeddings.shape == (NUM_IMAGES, 2, 77, 32)
    np.testing.assert_allclose(embeddings[0], np.load(encoded / EMBEDDINGS)[0, :2], atol=1e-5)
    monkeypatch.setattr(encoding, "encode_images", None)
    args = SimpleNamespace(dataroot=str(coco), sd_version=None, device="cpu")
    assert prepare_training_set(model, resolved(args)).embeddings.shape[1] == 2, (
        "the scripts need no flag for it"
    )


def test_a_metadata_jsonl_gives_rows_in_its_order_whatever_the_folders(folder, model, monkeypatch):
    run(monkeypatch, model, folder)
    training_set = open_training_set(folder, "mine", (4, 4, 4), {"embeddings": (77, 32)})
    assert training_set.paths == [
        folder / "pictures" / name for name in ("b/2.png", "1.png", "3.jpg")
    ]
    assert training_set.captions == [
        "a cat",
        "a dog",
        "a bus",
    ] and training_set.embeddings.shape == (3, 2, 77, 32)
    np.testing.assert_allclose(
        training_set.embeddings[1],
        encode_prompts(model, ["a dog", "the dog"])["embeddings"],
        atol=1e-5,
    )


@pytest.mark.parametrize(
    "entries, said",
    [
        (
            [{"file_name": "1.png", "text": 3}],
            "line 1: expected an object with a string `file_name` and `text`",
        ),
        ([[1]], "line 1: expected an object"),
        (
            [{"file_name": "1.png", "text": "a dog"}],
            "2 of 3 images without captions in metadata.jsonl, first 3.jpg",
        ),
        (
            [
                {"file_name": name, "text": text}
                for name, text in (("1.png", "a dog"), ("b/2.png", ["a", "b"]), ("3.jpg", "c"))
            ],
            "b/2.png has 2 captions, expected 1 as of every image",
        ),
        (
            [
                {"file_name": name, "text": text}
                for name, text in (("1.png", "a dog"), ("b/2.png", None), ("3.jpg", []))
            ],
            "2 of 3 images without captions, first b/2.png",
        ),
    ],
)
def test_a_metadata_jsonl_that_does_not_fit_is_named_with_what_is_wrong(
    entries, said, folder, capsys
):
    write_lines(folder, entries)
    assert said in refused(capsys, encode.main, ["--dataroot", str(folder), "--device", "cpu"])


def test_a_line_of_metadata_that_writes_a_key_twice_is_refused(tmp_path):
    (tmp_path / "metadata.jsonl").write_text(
        '{"file_name": "1.png", "text": "a dog", "text": "a cat"}\n'
    )
    with pytest.raises(UserError, match="line 1: not valid JSON .the key text is written twice"):
        read_metadata(tmp_path / "metadata.jsonl")


def test_arrays_that_came_with_the_data_root_stay_unless_they_are_to_be_replaced(
    coco, encoded, model, monkeypatch, capsys
):
    np.save(coco / LATENTS, np.zeros((2 * NUM_IMAGES, 4, 4, 4), np.float16))
    line = refused(capsys, encode.main, ["--dataroot", str(coco), "--device", "cpu"])
    assert (
        f"{LATENTS}: came without a record and without {EMBEDDINGS}; download that too, or make "
        f"both" in line
    )
    assert line.endswith(f"python -m unlearn encode --dataroot {coco} --overwrite")
    np.save(coco / EMBEDDINGS, np.ones((NUM_IMAGES, 5, 77, 32), np.float16))
    before = files(coco)
    run(monkeypatch, model, coco)
    assert files(coco) == before
    training_set = open_training_set(coco, "mscoco", (4, 4, 4), {"embeddings": (77, 32)})
    assert (
        training_set.embeddings.shape == (NUM_IMAGES, 5, 77, 32)
        and training_set.embeddings.dtype == np.float16
    )
    assert (
        training_set.paths[0].name
        == json.loads((coco / CAPTIONS).read_text())["images"][0]["file_name"]
    )
    run(monkeypatch, model, coco, "--overwrite")
    assert made(coco) == made(encoded)


def test_a_disk_without_room_is_told_before_the_first_image(coco, model, monkeypatch):
    monkeypatch.setattr(encoding.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match="latents and embeddings need 0.0 GB more, 0.0 GB are free"):
        run(monkeypatch, model, coco)
    assert not list(coco.glob("*.part"))


def test_a_dry_run_tells_the_sizes_and_makes_nothing(coco, model, monkeypatch, capsys):
    before = files(coco)
    run(monkeypatch, model, coco, "--dry_run")
    assert "24 images with 5 captions each" in capsys.readouterr().out and files(coco) == before


def test_the_identity_of_a_root_without_dataset_json_is_what_it_always_was(root, model):
    """Caches and results in use hang on it."""
    paths, captions = pairs.list_pairs(root)
    lines = (root / "laion_subset/captions.txt").read_text().splitlines()
    names = sorted((root / "laion_subset/images").iterdir())
    tokens = model.pipeline.tokenizer(
        lines, padding="max_length", truncation=True, max_length=77
    ).input_ids
    identity = encoding.encoding_identity(
        model, root, paths, captions, 512, [hash_picture(path) for path in paths]
    )
    assert (identity["tokens"], identity["captions"]) == (digest(tokens), digest(lines))
    assert identity["images"] == digest([[path.name, hash_file(path)] for path in names])
    assert identity.keys() == {
        "scaling",
        "tokens",
        "images",
        "captions",
        "resolution",
        "vae",
        "text_encoder",
    }


def test_hashes_do_not_depend_on_how_a_version_of_transformers_names_the_text_encoder(model):
    text_encoder = model.pipeline.text_encoder
    weights = named_weights(text_encoder)
    older = SimpleNamespace(
        state_dict=lambda: {f"text_model.{name}": value for name, value in weights.items()}
    )
    assert weights.keys() == text_encoder.state_dict().keys() and hash_tensors(
        named_weights(older)
    ) == hash_tensors(weights)
    mixed = SimpleNamespace(
        state_dict=lambda: {"text_model.a": torch.ones(1), "text_projection": torch.ones(1)}
    )
    assert named_weights(mixed).keys() == {"text_model.a", "text_projection"}


@pytest.mark.parametrize("rows", [[], [[]], [[1, 2], [3]], ["a", "ß"]])
def test_rows_hashed_one_by_one_give_the_digest_of_their_list(rows):
    assert digest_rows(iter(rows)) == digest(rows)


@pytest.mark.parametrize(
    "settings, said",
    [
        (
            {"latents": "../x.npy"},
            "latents: expected a path inside the data root, relative to it and no .., found "
            "../x.npy",
        ),
        ({"images": "/etc"}, "images: expected a path inside the data root"),
        ({"captions": ""}, "captions: expected a path inside the data root"),
        ({"embeddings": "x.pt"}, "embeddings: expected a name that ends in .npy, found x.pt"),
        (
            {"captions": "x.tsv"},
            "captions: expected a name that ends in .txt or .jsonl or .csv or .json",
        ),
        ({"latents": "x.npy", "embeddings": "x.npy"}, "embeddings x.npy: it, or its record"),
        (
            {"latents": "dataset.npy"},
            "latents dataset.npy: it, or its record dataset.json, would stand where dataset.json "
            "does",
        ),
        (
            {"latents": "a/c.npy", "captions": "a/c.json"},
            "captions a/c.json: it, or its record a/c.json, would stand where latents does",
        ),
        ({"num_captions": -1}, "num_captions -1: expected a non-negative whole number"),
    ],
)
def test_file_names_in_dataset_json_that_lead_out_or_collide_are_refused(settings, said, root):
    (root / "dataset.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="dataset.json") as error:
        read_settings(root)
    assert said in str(error.value)


def test_a_folder_of_images_may_be_a_link_that_the_user_made(root, tmp_path, model):
    other = tmp_path / "other"
    other.mkdir()
    (other / "laion_subset").symlink_to("../abc/laion_subset")
    assert pairs.list_pairs(other)[1] == pairs.list_pairs(root)[1]
    assert len(list_images(other)) == 60


def test_the_fisher_that_dataset_json_names_goes_before_the_one_found(coco):
    args = SimpleNamespace(dataroot=str(coco), fisher_path=None)
    (coco / "sd_fisher.safetensors").touch()
    assert find_fisher(args) == coco / "sd_fisher.safetensors", "named, but not there"
    (coco / "fisher_info.pt").touch()
    assert find_fisher(args) == coco / "fisher_info.pt"
    args.fisher_path = str(coco / "sd_fisher.safetensors")
    assert find_fisher(args) == coco / "sd_fisher.safetensors"


def test_sixteen_bits_of_grey_are_not_cut_off_to_white(tmp_path):
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(ramp.astype(np.uint16) * 257).save(tmp_path / "grey.png")
    assert (np.asarray(load_image(tmp_path / "grey.png"))[..., 0] == ramp).all()


def poison(root, name, shape):
    """What an earlier version left of a model whose parts do not fit: a file that ends before its
    header says, under a complete record."""
    path = root / name
    content = path.read_bytes()
    header = np.lib.format.magic(1, 0)
    np.save(path, np.zeros(shape, np.float32))
    whole = path.read_bytes()
    assert whole.startswith(header)
    path.write_bytes(whole[: len(content)])


@pytest.mark.parametrize(
    "break_it",
    [
        lambda root: poison(root, LATENTS, (2 * NUM_IMAGES, 9, 4, 4)),
        lambda root: np.save(root / LATENTS, np.zeros((2 * NUM_IMAGES, 8, 4, 4), np.float32)),
        lambda root: np.save(root / EMBEDDINGS, np.zeros((NUM_IMAGES, 5, 77, 16), np.float32)),
        lambda root: np.save(root / EMBEDDINGS, np.zeros((NUM_IMAGES - 1, 5, 77, 32), np.float32)),
        lambda root: (root / LATENTS).write_bytes(b""),
    ],
    ids=["ends early", "other channels", "other features", "other number", "empty"],
)
def test_an_array_that_cannot_be_opened_or_has_another_shape_is_told_by_doctor_and_made_again(
    break_it, encoded, tmp_path, model, monkeypatch
):
    root = shutil.copytree(encoded, tmp_path / "mscoco", symlinks=True)
    break_it(root)
    [finding, *_], _ = examination.examine_data(
        SimpleNamespace(dataroot=str(root), sd_version=None, fisher_path=None, lora=[])
    )
    assert (
        finding.status == machine.NOTE
        and "to be encoded anew at the next use" in finding.text
        and "unlearn encode" in finding.remedy
    )
    run(monkeypatch, model, root)
    assert made(root) == made(encoded) and not list(root.glob("*.part"))
    [finding, *_], _ = examination.examine_data(
        SimpleNamespace(dataroot=str(root), sd_version=None, fisher_path=None, lora=[])
    )
    assert finding == (machine.OK, "24 training images, encoded", "")


def test_overwrite_makes_anew_what_is_not_what_its_record_says_and_nothing_else(
    encoded, tmp_path, model, monkeypatch
):
    root = shutil.copytree(encoded, tmp_path / "mscoco", symlinks=True)
    content = bytearray((root / LATENTS).read_bytes())
    content[-1] ^= 1
    (root / LATENTS).write_bytes(content)
    monkeypatch.setattr(text_files, "encode_prompts", None)
    run(monkeypatch, model, root, "--overwrite")
    assert made(root) == made(encoded)
    monkeypatch.setattr(encoding, "encode_images", None)
    run(monkeypatch, model, root, "--overwrite")


def test_rows_of_another_shape_are_never_written(coco, model, monkeypatch):
    monkeypatch.setattr(
        encoding,
        "encode_images",
        lambda pipeline, paths, *how: np.ones((len(paths), 8, 4, 4), np.float32),
    )
    before = files(coco)
    with pytest.raises(
        UserError,
        match=r"the pipeline made \[5, 8, 4, 4\] of the latents of the training set, expected "
        r"\[5, 4, 4, 4\]",
    ):
        run(monkeypatch, model, coco)
    assert files(coco) == before


def test_what_was_begun_with_rows_of_another_shape_is_begun_anew(encoded, coco, model, monkeypatch):
    real, paths = encoding.encode_images, []
    monkeypatch.setattr(
        encoding,
        "encode_images",
        lambda pipeline, some, *how: paths.append(some) or real(pipeline, some, *how),
    )
    monkeypatch.setattr(
        os, "replace", lambda source, target: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, model, coco)
    monkeypatch.undo()
    [part] = coco.glob(f"{LATENTS}.*.part")
    with part.open("wb") as file:
        np.save(file, np.ones((2 * NUM_IMAGES, 9, 4, 4), np.float32))
    run(monkeypatch, model, coco)
    assert made(coco) == made(encoded)


def forbid_writing(monkeypatch, folder):
    """A read-only file system below a folder: every call that would change it fails, and says so
    when it is asked."""
    folder = os.path.realpath(folder)
    below = lambda path: (
        isinstance(path, (str, os.PathLike))
        and os.path.realpath(os.path.dirname(os.path.abspath(path))).startswith(folder)
    )

    def refuse(function, which):
        def call(*args, **how):
            if any(below(path) for path in args[:2]) and which(args):
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), os.fspath(args[0]))
            return function(*args, **how)

        return call

    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
    monkeypatch.setattr(os, "open", refuse(os.open, lambda args: args[1] & writing))
    for name in "mkdir", "unlink", "rename", "replace", "link", "symlink", "rmdir", "utime":
        monkeypatch.setattr(os, name, refuse(getattr(os, name), lambda args: True))
    may = os.access
    monkeypatch.setattr(
        os,
        "access",
        lambda path, how, **more: (
            not (how & os.W_OK and below(os.path.join(path, "x"))) and may(path, how, **more)
        ),
    )


def test_an_encoded_root_that_cannot_be_written_is_used_as_it_is_and_no_problem_for_doctor(
    encoded, model, monkeypatch, tmp_path
):
    before = files(encoded)
    forbid_writing(monkeypatch, encoded)
    args = SimpleNamespace(dataroot=str(encoded), sd_version=None, device="cpu", fisher_path=None)
    assert (
        len(prepare_training_set(model, resolved(args))) == NUM_IMAGES and files(encoded) == before
    )
    [finding, *_], _ = examination.examine_data(args)
    assert finding.status == machine.OK
    [disk] = machine.examine_disk({"data root": args.dataroot}, {}, {"data root"})
    assert (disk.status, disk.text) == (
        machine.OK,
        f"data root {encoded}: cannot be written, and nothing has to be",
    )


def test_a_root_that_cannot_be_written_comes_with_commands_that_make_ones_own(
    coco, encoded, model, monkeypatch, tmp_path
):
    (coco / LATENTS).write_bytes((encoded / LATENTS).read_bytes())  # another model's, say
    record_path(coco / LATENTS).write_text(json.dumps({"identity": {}}))
    before = files(coco)
    with monkeypatch.context() as patch:
        forbid_writing(patch, coco)
        patch.setattr(pairs, "find_unreadable", None)  # told before the pictures are decoded
        with pytest.raises(
            UserError,
            match="latents and embeddings are to be made there: make a data root of your own",
        ) as error:
            run(patch, model, coco)
        [disk] = machine.examine_disk({"data root": coco}, {"data root": own_root.own_root(coco)})
    assert (
        disk.status == machine.PROBLEM
        and f"({disk.remedy})" in str(error.value)
        and files(coco) == before
    )
    elsewhere = tmp_path / "else where"
    elsewhere.mkdir()
    subprocess.run(disk.remedy, shell=True, check=True, cwd=elsewhere)
    run(monkeypatch, model, elsewhere / "mscoco_own")
    assert made(elsewhere / "mscoco_own") == made(encoded)
    assert (elsewhere / "mscoco_own/train2017").is_symlink() and not (
        elsewhere / "mscoco_own/sample"
    ).is_symlink()
