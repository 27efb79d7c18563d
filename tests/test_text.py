"""Captions, prompts and names as people bring them: paired rightly, read alike, cut off by nobody
unsaid, safe to show."""

import ast
import io
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PARITY
from PIL import Image
from test_bad_input import INFLUENCE_FLAGS, LOSS_FLAGS, SCRIPTS, TASKS, encode_images, refused
from test_house_rules import TREES
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

import compute_influence
import compute_training_loss
from unlearn import UserError
from unlearn.commands import doctor, encode, generate, preparation
from unlearn.datasets import queries
from unlearn.datasets.annotations import read_lines
from unlearn.datasets.captions import IMAGE_SUFFIXES, UNREAD_SUFFIXES, pair_images
from unlearn.datasets.encoders import find_unknown
from unlearn.datasets.pictures import FORMATS
from unlearn.datasets.training_sets import label_rows, open_training_set
from unlearn.models.pipelines import load_model
from unlearn.report.figures import draw_influence, wrap_text
from unlearn.report.ranking import print_table, write_csv
from unlearn.runtime import programs
from unlearn.runtime.printing import LineFormatter, printable, show
from unlearn.storage.artifacts import write_json
from unlearn.storage.reading import read_array, read_json, read_text, resolve_inside
from unlearn.storage.records import record_path

ARRAYS = "laion_latents.npy", "laion_text_embeddings.npy"
BOM = b"\xef\xbb\xbf"
NASTY = "\x1b[2J\x1b]0;title\x07 line\nnext\r\t\u202eoverride\u2028\x9b31m"
CYRILLIC = "кот и собака"


@pytest.fixture
def images(root):
    """Takes pictures by name and captions as the text of a file; the folder of the pictures of a
    root without arrays."""

    def write(names, captions):
        for path in [root / name for name in ARRAYS] + list(
            (root / "laion_subset/images").iterdir()
        ):
            path.unlink(missing_ok=True)
        for number, name in enumerate(names):
            path = Path(
                os.fsdecode(
                    os.fsencode(root / "laion_subset/images")
                    + b"/"
                    + (name if isinstance(name, bytes) else name.encode())
                )
            )
            path.parent.mkdir(exist_ok=True)
            file = io.BytesIO()
            Image.new("RGB", (16, 16), (40 * number, 9, 9)).save(file, "PNG")
            path.write_bytes(file.getvalue())
        (root / "laion_subset/captions.txt").write_bytes(
            captions if isinstance(captions, bytes) else captions.encode()
        )
        (root / "dataset.json").write_text(
            json.dumps(
                {"name": "mine", "resolution": 32, "pipeline": str(PARITY / "fixture/sd-tiny")}
            )
        )
        return root / "laion_subset/images"

    return write


@pytest.fixture
def encode_root(root, model, monkeypatch):
    """Runs `encode` with a model that is loaded already."""
    monkeypatch.setattr(encode, "load_model", lambda *where, **more: model)
    return lambda *flags: encode.main(["--dataroot", str(root), "--device", "cpu", *flags])


@pytest.fixture
def lent(monkeypatch, model):
    """Lends the scripts a model that is loaded already."""
    for script in compute_training_loss, compute_influence:
        monkeypatch.setattr(preparation, "load_model", lambda *names, **more: model)
    monkeypatch.setattr(queries, "encode_images", encode_images)


@pytest.fixture
def no_model(monkeypatch):
    """Makes loading a model a failure."""
    for script in compute_training_loss, compute_influence, encode, generate:
        monkeypatch.setattr(preparation, "load_model", None)


@pytest.fixture
def one_task(flags, tmp_path):
    """Takes changes of a task (its prompt, ...); flags with the task file of it alone."""

    def write(**changes):
        (tmp_path / "tasks.json").write_text(json.dumps([{**TASKS[0], **changes}]))
        return [str(tmp_path / "tasks.json") if value == flags[1] else value for value in flags]

    return write


def made(root):
    """The bytes of both arrays and the identities in their records."""
    return [
        ((root / name).read_bytes(), read_json(record_path(root / name))["identity"])
        for name in ARRAYS
    ]


# Captions by position

AMBIGUOUS = [
    ["2.png", "10.png"],
    ["cat9.png", "cat10.png"],
    ["1_2.jpg", "1_10.jpg"],
    ["b.png", "C.png", "a.png"],
    ["img (2).png", "img (10).png"],
    ["Ähre.png", "Apfel.png", "Birne.png"],
    ["cat.png", "cat_2.png", "cat-3.png", "cat 4.png"],
    ["a.png", "a (1).png", "a (2).png"],
    ["١٠.png", "٢.png"],
    ["１０.png", "２.png"],
    ["ab-c.png", "abb.png"],
]


@pytest.mark.parametrize("names", AMBIGUOUS)
def test_lines_whose_images_have_no_one_order_are_refused_and_the_advised_metadata_pairs_them(
    names, root, images, no_model, capsys
):
    folder = images(names, "".join(f"first of {name}\n" for name in names))
    line = refused(capsys, encode.main, ["--dataroot", str(root), "--device", "cpu"])
    assert (
        "captions.txt: which line is whose?" in line
        and "order as text gives" in line
        and " lists them " in line
    )
    entry = json.loads(line[line.index('{"') : line.index("}") + 1])
    assert (
        entry["file_name"] in names
        and entry["text"] in (root / "laion_subset/captions.txt").read_text()
    )
    by_name = {name: f"first of {name}" for name in names}
    (root / "laion_subset/metadata.jsonl").write_text(
        "".join(
            json.dumps({**entry, "file_name": name, "text": by_name[name]}) + "\n" for name in names
        )
    )
    paths, captions = pair_images(folder, root / "laion_subset/metadata.jsonl")
    assert {path.name: caption for path, [caption] in zip(paths, captions)} == by_name


def test_the_message_shows_both_pairings_and_a_name_with_zeros_that_is_accepted(
    root, images, no_model, capsys
):
    folder = images(["1.png", "2.png", "10.png"], "one\ntwo\nten\n")
    line = refused(capsys, encode.main, ["--dataroot", str(root), "--device", "cpu"])
    assert (
        "From line 2 the names' order as text gives 10.png: two, 2.png: ten; a file browser "
        "lists them 2.png: two, 10.png: ten." in line
    )
    assert "Rename the images with leading zeros (2.png to 000002.png)" in line
    for name in "1.png", "2.png", "10.png":
        (folder / name).rename(folder / f"{Path(name).stem:0>6}.png")
    paths, captions = pair_images(folder, root / "laion_subset/captions.txt")
    assert [(path.name, caption) for path, [caption] in zip(paths, captions)] == [
        ("000001.png", "one"),
        ("000002.png", "two"),
        ("000010.png", "ten"),
    ]


@pytest.mark.parametrize(
    "names",
    [
        ["000002.png", "000010.png"],
        ["a.png", "a1.png", "b.png"],
        ["1.jpg", "1.png", "2.png"],
        ["01.png", "1.png"],
        ["x-2.png", "x-3.png"],
        ["кот.png", "собака.png"],
    ],
)
def test_lines_of_images_in_the_one_order_that_there_is_are_paired_by_it(names, root, images):
    folder = images(names[::-1], "".join(f"{name}\n" for name in names))
    paths, captions = pair_images(folder, root / "laion_subset/captions.txt")
    assert [path.name for path in paths] == [caption for [caption] in captions] == names


@pytest.mark.parametrize(
    "captions, entry",
    [
        ("b.png a dog\na.png a cat\n", {"file_name": "b.png", "text": "a dog"}),
        ("a cat\na.png\ta cat\n", {"file_name": "a.png", "text": "a cat"}),
        ("images/b.png,a dog\nx\n", {"file_name": "b.png", "text": "a dog"}),
        ('"b.png", a dog\nx\n', {"file_name": "b.png", "text": "a dog"}),
        ("b.png#0\ta dog\nx\n", {"file_name": "b.png", "text": "0\\ta dog"}),
    ],
)
def test_lines_that_carry_names_of_images_are_refused_with_an_entry_of_their_own(
    captions, entry, root, images, no_model, capsys
):
    images(["a.png", "b.png"], captions)
    line = refused(capsys, encode.main, ["--dataroot", str(root), "--device", "cpu"])
    assert "captions.txt: " in line and "lines begin with an image's name, first line" in line
    assert json.loads(line[line.index('{"') : line.index("}") + 1]) == entry


def test_lines_with_names_of_no_image_there_are_captions(root, images):
    images(["a.png", "b.png"], "c.png a dog\nphoto.jpg, a cat\n")
    assert (
        len(pair_images(root / "laion_subset/images", root / "laion_subset/captions.txt")[0]) == 2
    )


@pytest.mark.parametrize("captions", ["captions.txt", "metadata.jsonl"])
def test_pictures_that_get_no_row_are_counted_and_named(
    captions, root, images, encode_root, caplog
):
    folder = images(
        [
            "a.png",
            "b.png",
            "c.mpo",
            "c.png~",
            "d.png.bak",
            "plain",
            *(["in/e.png"] if captions == "captions.txt" else []),
        ],
        "one\ntwo\n",
    )
    (folder / "notes.md").write_text("no picture")
    (root / "laion_subset/metadata.jsonl").write_text(
        "".join(json.dumps({"file_name": f"{name}.png", "text": "a"}) + "\n" for name in "ab")
    )
    (root / "dataset.json").write_text(
        json.dumps(
            {
                **json.loads((root / "dataset.json").read_text()),
                "captions": f"laion_subset/{captions}",
            }
        )
    )
    for flags in ["--dry_run"], []:
        caplog.clear()
        with caplog.at_level(logging.INFO, "unlearn"):
            encode_root(*flags)
        [line] = [line for line in caplog.messages if "no training images" in line]
        assert (
            f"images: {5 if captions == 'captions.txt' else 4} pictures there are no training "
            f"images, first c.mpo, c.png~, d.png.bak:" in line
        )


def test_arrays_that_are_there_are_not_labelled_by_an_order_that_is_not_clear(root, model):
    folder = root / "laion_subset/images"
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(folder / f"{number}.png")
    with pytest.raises(
        UserError,
        match="captions.txt: which line is whose. From line 3 the names' order as text gives "
        "10.png: a purple star",
    ):
        open_training_set(root, "abc", model.latent_shape(512), model.conditioning_shapes)
    (root / "laion_subset/captions.txt").unlink()
    with pytest.raises(
        UserError,
        match="which row is whose. From row 3 the names' order as text gives 10.png, 11.png, "
        "12.png; a file browser lists",
    ):
        open_training_set(root, "abc", model.latent_shape(512), model.conditioning_shapes)
    (root / "laion_subset/captions.txt").write_text("one\n")
    with pytest.raises(UserError, match="laion_subset: 1 captions for 60 rows"):
        open_training_set(root, "abc", model.latent_shape(512), model.conditioning_shapes)


def test_hidden_files_and_folders_are_no_pictures_in_any_kind_of_captions(root, images):
    names = ["000001.png", "000002.png"]
    folder = images([*names, "._000003.png", ".DS_Store"], "one\ntwo\n")
    for inner in ".ipynb_checkpoints", "__MACOSX":
        (folder / inner).mkdir()
        (folder / inner / "000001-checkpoint.png").write_bytes((folder / names[0]).read_bytes())
    metadata = root / "laion_subset/metadata.jsonl"
    metadata.write_text(
        "".join(json.dumps({"file_name": name, "text": name}) + "\n" for name in names)
    )
    for path in root / "laion_subset/captions.txt", metadata:
        assert [found.name for found in pair_images(folder, path)[0]] == names


def test_a_hidden_file_beside_a_missing_picture_shifts_no_caption(root, images):
    folder = images(["000001.png", "000002.png", "._000003.png"], "one\ntwo\nthree\n")
    with pytest.raises(
        UserError, match="expected a line for each image of .*, found 2 images, 3 lines"
    ):
        pair_images(folder, root / "laion_subset/captions.txt")


@pytest.mark.parametrize("suffix", [".avif", ".HEIC", ".svg"])
@pytest.mark.parametrize("captions", ["captions.txt", "metadata.jsonl"])
def test_a_picture_of_a_kind_that_is_not_read_is_named_and_counted(suffix, captions, root, images):
    folder = images(
        ["000001.png", f"000002{suffix}", f"000004{suffix}", "000003.png"], "one\nthree\n"
    )
    (root / "laion_subset/metadata.jsonl").write_text(
        "".join(json.dumps({"file_name": f"00000{n}.png", "text": "a"}) + "\n" for n in (1, 3))
    )
    with pytest.raises(
        UserError,
        match=f"images: 2 pictures of a kind that is not read, first 000002{suffix}; make them "
        f"PNG or JPEG",
    ):
        pair_images(folder, root / f"laion_subset/{captions}")


def test_the_suffixes_of_pictures_are_those_of_the_formats_that_are_read():
    Image.init()
    assert IMAGE_SUFFIXES == {
        suffix for suffix, form in Image.registered_extensions().items() if form in FORMATS
    }
    assert not IMAGE_SUFFIXES & UNREAD_SUFFIXES


@pytest.mark.parametrize(
    "text, lines",
    [
        (b"a\nb", ["a", "b"]),
        (b"a\nb\n", ["a", "b"]),
        (b"a\nb\n\n", ["a", "b"]),
        (b"a\nb\n \t\n\n", ["a", "b"]),
        (b"a\n\nb\n", ["a", "", "b"]),
        (b"a \nb  ", ["a ", "b  "]),
        (b"", []),
        (b"\n\n", []),
        (b"\na\n", ["", "a"]),
        (b"a\r\nb\r\n", ["a", "b"]),
        (b"a\rb\r", ["a", "b"]),
        (b"a\x0bb\xe2\x80\xa8c\n", ["a\x0bb\u2028c"]),
        (BOM + b"a\nb\n", ["a", "b"]),
        (b"a\n" + BOM + b"b\n", ["a", "b"]),
        (BOM, []),
    ],
)
def test_a_line_is_a_caption_but_for_blank_ones_at_the_end(text, lines, tmp_path):
    (tmp_path / "captions.txt").write_bytes(text)
    assert read_lines(tmp_path / "captions.txt") == lines


def test_encoding_shows_the_first_pairs_and_counts_empty_and_cut_captions(
    root, images, encode_root, caplog
):
    images(
        [f"{number}.png" for number in range(5)],
        f"a cat\n\x1b[2J{'long ' * 14}\n\n{'a very long caption ' * 40}\nlast\n",
    )
    with caplog.at_level(logging.INFO, "unlearn"):
        encode_root()
    assert caplog.messages[2:7] == [
        '0.png -> "a cat"',
        f'1.png -> "\\x1b[2J{"long " * 10}lo…"',
        '2.png -> ""',
        "1 of 5 captions are empty",
        "1 of 5 captions are longer than the 77 tokens of the model's tokenizer; their ends are "
        "cut off",
    ]
    caplog.clear()
    with caplog.at_level(logging.INFO, "unlearn"):
        encode_root()
    assert (
        "->" not in caplog.text
        and "captions" not in caplog.text
        and "are there already" in caplog.text
    )


def test_a_dry_run_of_encoding_shows_the_first_pairs(root, images, encode_root, caplog):
    images(["1.png", "2.png"], "one\ntwo\n")
    with caplog.at_level(logging.INFO, "unlearn"):
        encode_root("--dry_run")
    assert caplog.messages[-2:] == ['1.png -> "one"', '2.png -> "two"']


# Text files


@pytest.mark.parametrize("captions", ["captions.txt", "metadata.jsonl"])
def test_a_byte_order_mark_and_other_line_ends_change_no_bit_and_no_identity(
    captions, root, images, encode_root
):
    names, lines = ["1.png", "2.png"], ["a dog", "a red cat"]
    images(names, "".join(f"{line}\n" for line in lines))
    path = root / "laion_subset" / captions
    settings = json.loads((root / "dataset.json").read_text())
    (root / "dataset.json").write_text(
        json.dumps({**settings, "captions": f"laion_subset/{captions}"})
    )
    if captions == "metadata.jsonl":
        path.write_text(
            "".join(
                json.dumps({"file_name": name, "text": line}) + "\n"
                for name, line in zip(names, lines)
            )
        )
    plain, found = path.read_bytes(), []
    for content in (
        plain,
        BOM + plain,
        BOM + plain.replace(b"\n", b"\r\n"),
        plain.replace(b"\n", b"\r"),
    ):
        path.write_bytes(content)
        encode_root("--overwrite")
        found.append(made(root))
        for name in ARRAYS:
            (root / name).unlink()
            record_path(root / name).unlink()
    assert all(each == found[0] for each in found[1:]) and label_rows(root)[2] == lines


def test_every_text_file_of_a_run_may_begin_with_a_byte_order_mark(
    root, one_task, tmp_path, lent, monkeypatch, capsys
):
    argv = [*one_task(), *LOSS_FLAGS, "--dry_run"]
    compute_training_loss.main(argv)
    plan = capsys.readouterr().out
    (root / "dataset.json").write_text("{}")
    changed = [
        path for path in [*root.rglob("*.json"), *root.rglob("*.txt"), tmp_path / "tasks.json"]
    ]
    for path in changed:
        path.write_bytes(BOM + path.read_bytes())
    compute_training_loss.main(argv)
    assert capsys.readouterr().out == plan and len(changed) == 5


@pytest.mark.parametrize("name", ["prompts.txt", "prompts.json"])
def test_prompts_may_begin_with_a_byte_order_mark(name, tmp_path):
    text = (
        "a cat\r\na dog\n"
        if name.endswith("txt")
        else json.dumps({"annotations": [{"caption": "a cat"}, {"caption": "a dog"}]})
    )
    (tmp_path / name).write_bytes(BOM + text.encode())
    assert generate.read_prompts(tmp_path / name, None) == ["a cat", "a dog"]


@pytest.mark.parametrize(
    "code, said",
    [
        ("utf-16", "UTF-16 text; save it as UTF-8"),
        ("utf-32", "UTF-32 text; save it as UTF-8"),
        ("utf-16-le", "it holds NUL, as UTF-16 does"),
        ("utf-16-be", "it holds NUL"),
        ("latin-1", "not UTF-8 text ('utf-8' codec can't decode byte 0xe9"),
    ],
)
def test_text_that_is_not_utf8_is_named_as_what_it_is(code, said, tmp_path):
    path = tmp_path / "text.json"
    path.write_bytes('{"caption": "café"}'.encode(code))
    for read in read_text, read_json:
        with pytest.raises(UserError) as error:
            read(path, "captions")
        assert (
            said in str(error.value)
            and str(error.value).startswith(f"captions {path}: ")
            and "save it as UTF-8" in str(error.value)
        )


@pytest.mark.parametrize(
    "name",
    [
        "model_index.json",
        "unet/config.json",
        "tokenizer/tokenizer_config.json",
        "tokenizer/tokenizer.json",
    ],
)
def test_a_byte_order_mark_that_diffusers_does_not_read_is_named_and_what_is_advised_removes_it(
    name, tmp_path
):
    folder = shutil.copytree(PARITY / "fixture/sd-tiny", tmp_path / "a pipeline")
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(BOM + whole)
    with pytest.raises(
        UserError,
        match=f"{name} begins with a byte order mark, which diffusers does not read; remove it: "
        f"sed",
    ) as error:
        load_model(str(folder), "cpu")
    subprocess.run(str(error.value).partition("remove it: ")[2], shell=True, check=True)
    assert (folder / name).read_bytes() == whole


def test_text_of_others_is_read_in_one_place():
    own = {
        "unlearn.storage.leases",
        "unlearn.benchmark.meters",
        "unlearn.storage.artifacts",
        "unlearn.report.page",
        "unlearn.commands.machine",
    }  # what the system or this project wrote
    for name, tree in TREES.items():
        called = {
            node.func.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        }
        texts = {
            node.func.value.id
            for node in ast.walk(tree)
            if isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr == "load"
            and isinstance(node.func.value, ast.Name)
        }
        assert "read_text" not in called or name in own, name
        assert "json" not in texts, name


# Prompts

LONG = " ".join(f"word{number}" for number in range(40))


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    "changes",
    [
        {"prompt": f"{LONG} <new1> heart"},
        {"prompt": f"{LONG} <New1>"},
        {"train_prompt": f"{LONG} <new1>"},
    ],
)
def test_a_prompt_whose_token_would_be_cut_off_is_refused(
    changes, script, one_task, lent, cached_losses, capsys
):
    module, flags = SCRIPTS[script]
    line = refused(capsys, module.main, [*one_task(**changes), *flags])
    item = (
        "models/tiny/blob: train_prompt"
        if "train_prompt" in changes
        else TASKS[0]["synth_image_path"]
    )
    assert (
        f"{item}: {re.search('<.*>', *changes.values())[0]} would be cut off: its prompt has "
        in line
        and "tokens, the model reads the first 77; shorten the prompt" in line
    )


@pytest.fixture
def cached_losses(tmp_path):
    """Files where losses are expected, so that what is wrong with prompts is told, not that losses
    are missing."""
    for name in "exemplar", "laion":
        path = tmp_path / f"results/orig_loss/tiny/blob/{name}_loss.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_a_prompt_that_is_cut_but_keeps_its_token_is_named(one_task, lent, caplog):
    with caplog.at_level(logging.WARNING, "unlearn"):
        compute_training_loss.main(
            [*one_task(prompt=f"<new1> heart {LONG}"), *LOSS_FLAGS, "--dry_run"]
        )
    [message] = caplog.messages
    assert message.startswith(
        f"1 prompts have more tokens than the 77 that the model reads, their ends are cut off: "
        f"{TASKS[0]['synth_image_path']} ("
    )


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    "prompt, word",
    [
        ("<cat-toy> heart", "<cat-toy>"),
        ("a photo of <new2> blob", "<new2>"),
        ("<new1> and <s>", "<s>"),
    ],
)
def test_a_token_that_nobody_brings_is_refused_before_a_model_is_loaded(
    prompt, word, script, one_task, cached_losses, no_model, capsys
):
    module, flags = SCRIPTS[script]
    line = refused(capsys, module.main, [*one_task(prompt=prompt), *flags])
    assert (
        f"models/tiny/blob: no embedding (*.bin) of {word}, which its prompts use (it has <new1>)"
        in line
    )


@pytest.mark.parametrize(
    "prompt", ["i <3 you <new1>", "a < b > c", "a <new1> blob -> <>", "<New1> blob"]
)
def test_other_uses_of_those_signs_stay_fine(prompt, one_task, lent, capsys):
    compute_training_loss.main([*one_task(prompt=prompt), *LOSS_FLAGS, "--dry_run"])
    assert "1 models, 1 queries" in capsys.readouterr().out


@pytest.mark.parametrize(
    "prompt, said",
    [
        ("a <café>", "no embedding (*.bin) of <café>, which its prompts use (it has <new1>)"),
        ("a <a.b>", "no embedding (*.bin) of <a.b>"),
        ("a <v*>", "no embedding (*.bin) of <v*>"),
        *(
            (
                f"a {word} blob",
                f"00000.png: {word} in its prompt is not read as the token <new1>; write <new1>",
            )
            for word in ("< new1 >", "<new 1>", "＜new1＞", "<ｎｅｗ1>")
        ),
    ],
)
def test_another_spelling_of_a_token_is_refused_with_the_right_one(
    prompt, said, one_task, no_model, capsys
):
    assert said in refused(
        capsys, compute_training_loss.main, [*one_task(prompt=prompt), *LOSS_FLAGS]
    )


def test_a_train_prompt_without_any_of_its_models_tokens_is_told(one_task, lent, caplog):
    with caplog.at_level(logging.WARNING, "unlearn"):
        compute_training_loss.main([*one_task(train_prompt="a blob"), *LOSS_FLAGS, "--dry_run"])
    [message] = [message for message in caplog.messages if "train_prompt" in message]
    assert (
        'models/tiny/blob: train_prompt "a blob" has none of the model\'s tokens (<new1>)'
        in message
    )
    caplog.clear()
    with caplog.at_level(logging.WARNING, "unlearn"):
        compute_training_loss.main(
            [*one_task(train_prompt="a <New1> blob"), *LOSS_FLAGS, "--dry_run"]
        )
    assert "train_prompt" not in caplog.text


# Scripts that a tokenizer lacks


@pytest.mark.parametrize("name", ["prompt", "train_prompt"])
def test_a_prompt_of_which_the_tokenizer_knows_nothing_is_refused(name, one_task, lent, capsys):
    line = refused(
        capsys,
        compute_training_loss.main,
        [*one_task(**{name: CYRILLIC}), *LOSS_FLAGS, "--dry_run"],
    )
    item = TASKS[0]["synth_image_path"] if name == "prompt" else "models/tiny/blob: train_prompt"
    assert (
        f"{item}: the model's tokenizer knows no character of its prompt, nothing of it would be "
        f"read: {CYRILLIC}; give" in line
    )


@pytest.mark.parametrize(
    "prompt, said",
    [
        (
            f"<new1> {CYRILLIC}",
            f"1 prompts have characters that the model's tokenizer does not know: "
            f"{TASKS[0]['synth_image_path']}",
        ),
        ("", f"1 prompts are empty: {TASKS[0]['synth_image_path']}"),
        (" \t", "1 prompts are empty"),
        ("<new1> cat <|endoftext|>", None),
    ],
)
def test_a_prompt_that_is_empty_or_known_in_part_is_told_by_name(
    prompt, said, one_task, lent, caplog
):
    with caplog.at_level(logging.WARNING, "unlearn"):
        compute_training_loss.main([*one_task(prompt=prompt), *LOSS_FLAGS, "--dry_run"])
    assert [
        message for message in caplog.messages if said and message.startswith(said)
    ] == caplog.messages and bool(said) == bool(caplog.messages)


def test_captions_that_the_tokenizer_does_not_know_are_counted(root, images, encode_root, caplog):
    images(
        [f"{number}.png" for number in range(6)],
        "a cat\nкот\nдом\na cat 猫\n<|endoftext|>\n<|endoftext|> cat\n",
    )
    with caplog.at_level(logging.INFO, "unlearn"):
        encode_root()
    assert (
        '3 of 6 captions have characters that the model\'s tokenizer does not know, first "кот"; '
        "nothing of 2 of them is "
        "read"
    ) in caplog.messages
    embeddings = read_array(root / ARRAYS[1])
    assert (
        (embeddings[1] == embeddings[2]).all()
        and (embeddings[0] == embeddings[3]).all()
        and (embeddings[0] != embeddings[1]).any()
    )


def test_a_vocabulary_of_all_bytes_or_without_an_unknown_token_knows_every_script():
    alphabet = {character: number for number, character in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE(alphabet, [])))
    tokenizer.backend_tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    for token in None, "!":
        tokenizer.unk_token = token
        assert find_unknown(tokenizer, [CYRILLIC, "猫", "", "!", "a!"]) == [(False, False)] * 5


@pytest.fixture
def own_token(tmp_path):
    """A pipeline whose tokenizer has <new2> in its own vocabulary."""
    folder = tmp_path / "own"
    pipeline = load_model(str(PARITY / "fixture/sd-tiny"), "cpu").pipeline
    pipeline.tokenizer.add_tokens(["<new2>"])
    pipeline.text_encoder.resize_token_embeddings(len(pipeline.tokenizer), mean_resizing=False)
    pipeline.save_pretrained(folder)
    return str(folder)


def test_a_token_of_the_pipelines_own_vocabulary_is_accepted_of_customized_and_base_models(
    own_token, one_task, root, tmp_path, monkeypatch, capsys
):
    model = load_model(own_token, "cpu")
    monkeypatch.setattr(preparation, "load_model", lambda *names, **more: model)
    monkeypatch.setattr(queries, "encode_images", encode_images)
    argv = [
        own_token if value.endswith("sd-tiny") else value
        for value in one_task(prompt="a <new1> beside a <new2>")
    ]
    compute_training_loss.main([*argv, *LOSS_FLAGS, "--dry_run"])
    (tmp_path / "tasks.json").write_text(
        json.dumps(
            [{name: TASKS[0][name] for name in ("synth_image_path",)} | {"prompt": "a <new2>"}]
        )
    )
    compute_training_loss.main([*argv, *LOSS_FLAGS, "--dry_run"])
    assert capsys.readouterr().out.count("1 models, 1 queries") == 2
    (tmp_path / "tasks.json").write_text(
        json.dumps(
            [{"synth_image_path": TASKS[0]["synth_image_path"], "prompt": f"{LONG} {LONG} <new2>"}]
        )
    )
    assert "00000.png: <new2> would be cut off" in refused(
        capsys, compute_training_loss.main, [*argv, *LOSS_FLAGS]
    )


def test_a_token_of_a_pipeline_that_is_not_on_this_machine_is_judged_when_it_is_loaded(
    one_task, model, monkeypatch, capsys
):
    monkeypatch.setattr(preparation, "load_model", lambda *names, **more: model)
    argv = [
        "someone/elsewhere" if value.endswith("sd-tiny") else value
        for value in one_task(prompt="a <cat-toy>")
    ]
    monkeypatch.setattr(preparation, "prepare_training_set", None)
    assert "no embedding (*.bin) of <cat-toy>" in refused(
        capsys, compute_training_loss.main, [*argv, *LOSS_FLAGS]
    )


@pytest.mark.parametrize(
    "prompts, said",
    [
        (
            "a cat\na <cat-toy>\n",
            "prompts.txt, prompt 2: the pipeline has no token <cat-toy>; leave it out",
        )
    ],
)
def test_generate_refuses_a_token_that_its_pipeline_does_not_have(
    prompts, said, root, tmp_path, no_model, capsys
):
    (tmp_path / "prompts.txt").write_text(prompts)
    argv = [
        "--prompts",
        str(tmp_path / "prompts.txt"),
        "--dataroot",
        str(root),
        "--sd_version",
        str(PARITY / "fixture/sd-tiny"),
        "--device",
        "cpu",
    ]
    assert said in refused(capsys, generate.main, [*argv, "--task_json", str(tmp_path / "t.json")])


def test_generate_says_which_prompts_are_cut(root, tmp_path, model, monkeypatch, caplog):
    (tmp_path / "prompts.txt").write_text(f"a cat\n{LONG}\n" + f"{LONG} again\n" * 3)
    monkeypatch.setattr(generate, "load_model", lambda *names, **more: model)
    monkeypatch.setattr(
        generate, "check_steps", lambda *given: (_ for _ in ()).throw(UserError("far enough"))
    )
    with pytest.raises(UserError, match="far enough"), caplog.at_level(logging.WARNING, "unlearn"):
        generate.main(
            [
                "--prompts",
                str(tmp_path / "prompts.txt"),
                "--dataroot",
                str(root),
                "--sd_version",
                str(PARITY / "fixture/sd-tiny"),
                "--device",
                "cpu",
                "--task_json",
                str(tmp_path / "t.json"),
            ]
        )
    assert (
        "4 prompts have more tokens than the 77" in caplog.text
        and "prompts.txt, prompt 2 (" in caplog.text
        and ") and 1 more" in caplog.text
    )


def test_doctor_tells_of_a_token_that_nobody_brings(one_task, capsys):
    argv = one_task(prompt="<cat-toy> heart")
    with pytest.raises(SystemExit):
        doctor.main(argv)
    assert (
        "problem  models/tiny/blob" not in (out := capsys.readouterr().out)
        and "no embedding (*.bin) of <cat-toy>" in out
    )


# Names of files


@pytest.mark.parametrize("captions", ["captions.txt", "metadata.jsonl"])
def test_a_picture_whose_name_is_not_utf8_is_refused_when_it_is_listed(
    captions, root, images, no_model, capsys
):
    images(["a.png", b"caf\xe9.png"], "one\ntwo\n")
    (root / "laion_subset/metadata.jsonl").write_text('{"file_name": "a.png", "text": "one"}\n')
    (root / "dataset.json").write_text(json.dumps({"captions": f"laion_subset/{captions}"}))
    line = refused(capsys, encode.main, ["--dataroot", str(root), "--device", "cpu"])
    assert f"{root}/laion_subset/images: the name 'caf\\udce9.png' is not UTF-8; rename it" in line


@pytest.mark.parametrize("flag", ["--dataroot", "--result_dir", "--task_json"])
def test_a_path_that_is_not_utf8_is_refused_before_anything_is_computed(
    flag, root, tmp_path, one_task, no_model, capsys
):
    argv = one_task()
    place = argv.index(flag) + 1
    old, new = argv[place], os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
    if os.path.exists(old):
        os.rename(old, new)
    argv[place] = new
    for module, flags in *SCRIPTS.values(), (doctor, []):
        line = refused(capsys, module.main, [*argv, *flags])
        assert f"{flag}: the name '{tmp_path}/caf\\udce9' is not UTF-8; rename it" in line


def test_a_json_file_holds_a_name_that_is_not_utf8(tmp_path):
    name = os.fsdecode(b"caf\xe9 \xd0\xba")
    write_json(tmp_path / "a.json", {"path": name})
    assert read_json(tmp_path / "a.json") == {"path": name}


def test_where_a_link_is_refused_the_message_says_that_it_is_one_and_where_it_leads(tmp_path):
    (tmp_path / "root").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "root/link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError) as error:
        resolve_inside(tmp_path / "root", "link/a.png", "exemplar")
    assert str(error.value) == (
        f"exemplar: expected a path inside {tmp_path}/root, found link/a.png, a link to "
        f"{tmp_path}/elsewhere/a.png: "
        "put what it leads to in its place"
    )
    with pytest.raises(UserError, match="found ../a.png$"):
        resolve_inside(tmp_path / "root", "../a.png", "exemplar")


# What a terminal gets


def test_what_is_shown_is_one_line_that_commands_no_terminal_and_text_stays_as_it_is():
    assert printable(NASTY) == r"\x1b[2J\x1b]0;title\x07 line\nnext\r\t\u202eoverride\u2028\x9b31m"
    for plain in "a cat", CYRILLIC, "猫と犬\u3000", "café, 10 °C", "👨‍👩‍👧 family", "नमस्ते", "a\\b":
        assert printable(plain) == plain
    assert printable("\udce9\0\ufeff") == r"\udce9\x00\ufeff"


def test_no_table_log_line_error_or_csv_cell_is_broken_by_what_it_holds(tmp_path, capsys):
    print_table(f"query: {NASTY}", ["rank", "caption"], [[1, NASTY], [2, "a cat"]])
    show(NASTY)
    programs.end_with(UserError(f"{NASTY}: no such file"))
    out, err = capsys.readouterr()
    assert (
        len(out.splitlines()) == 7
        and len(err.splitlines()) == 1
        and not set("\x1b\r\t\x07\u202e\u2028\x9b") & set(out + err)
    )
    record = logging.LogRecord("unlearn", logging.INFO, "", 0, f"{NASTY}: done", None, None)
    assert LineFormatter("%(message)s").format(record) == printable(f"{NASTY}: done")
    write_csv(
        tmp_path / "a.csv",
        ["id", "caption", "path"],
        [["1", NASTY, Path(NASTY)], ["2", 'a, "b"', None]],
    )
    assert (
        tmp_path / "a.csv"
    ).read_text() == f'id,caption,path\n1,{printable(NASTY)},{printable(NASTY)}\n2,"a, ""b""",\n'


@pytest.mark.parametrize("terminal", [True, False])
def test_what_progress_says_is_one_line(terminal, monkeypatch, caplog, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    with caplog.at_level(logging.INFO, "unlearn"), programs.progress(1, NASTY, "images") as bar:
        bar.update(1)
    shown = capsys.readouterr().err if terminal else caplog.messages[0]
    assert printable(NASTY) in shown and not set("\x1b\t\x07\u202e") & set(shown)


def test_a_picture_is_drawn_whatever_the_caption_holds():
    image = Image.new("RGB", (8, 8))
    draw_influence(image, NASTY, [(image, NASTY, True)])
    plain = draw_influence(image, "a cat", [(image, "1. a dog", False)])
    assert plain.size[0] > 192 and not set("\x1b\u202e") & set(
        wrap_text(Lengths(), NASTY, None, 50, 3)
    )


class Lengths:
    """A drawing that measures text by its characters."""

    def textlength(self, text, font):
        return len(text)


@pytest.mark.parametrize("code", ["latin-1", "ascii"])
def test_both_scripts_end_well_on_a_terminal_that_cannot_show_a_caption(
    code, root, one_task, lent, monkeypatch
):
    path = root / "laion_subset/captions.txt"
    path.write_text(f"{CYRILLIC} \x1b[2J\n" * len(path.read_text().splitlines()))
    argv = one_task(prompt=f"<new1> {CYRILLIC}")
    streams = [io.TextIOWrapper(io.BytesIO(), code) for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    programs.run(compute_training_loss.main, [*argv, *LOSS_FLAGS])
    programs.run(compute_influence.main, [*argv, *INFLUENCE_FLAGS])
    streams[0].flush()
    shown = streams[0].buffer.getvalue().decode(code)
    assert (
        shown.count(CYRILLIC.encode(code, "backslashreplace").decode(code)) >= 4
        and "\x1b" not in shown
        and r"\x1b[2J" in shown
    )


def test_captions_of_millions_of_images_are_read_and_what_is_no_text_is_not(tmp_path):
    path = tmp_path / "captions.txt"
    path.write_bytes(b"a red apple\n" * (11 << 20))
    assert path.stat().st_size > 128 << 20 and read_text(path).count("\n") == 11 << 20
    os.truncate(path, 1025 << 20)
    with pytest.raises(UserError, match="expected a text file of at most 1024 MB, found 1025 MB"):
        read_text(path)
