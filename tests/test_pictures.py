"""One rule for reading a picture: upright, on white, all its bits of grey; and what is told of
it."""

import ast
import importlib
import json
import shutil
import struct
import warnings
import zlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import PARITY, resolved
from PIL import Image, ImageOps, PngImagePlugin
from test_house_rules import TREES, dotted

from unlearn import UserError
from unlearn.commands import encode, examination, machine
from unlearn.commands.baselines import list_readings
from unlearn.commands.inputs import check_pictures, prepare_training_set
from unlearn.datasets import encoding, pictures, queries
from unlearn.datasets.encoding import encode_training_set
from unlearn.datasets.pictures import hash_picture, is_cropped, list_notes, load_image, read_picture
from unlearn.datasets.preparation import examine_pictures
from unlearn.datasets.queries import encode_exemplars, encode_query
from unlearn.datasets.settings import read_settings
from unlearn.datasets.tasks import load_tasks
from unlearn.datasets.training_sets import read_identity
from unlearn.evaluation.retrained import query_digests
from unlearn.models.families import STABLE_DIFFUSION
from unlearn.models.model import trained_resolution
from unlearn.models.pipelines import load_model
from unlearn.storage.hashes import digest, hash_file

ROOT = Path(__file__).parent.parent
RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)
RAMP = np.arange(256, dtype=np.uint16)[None].repeat(2, 0)


@pytest.fixture(scope="module")
def emoji():
    """A pipeline of 32 pixels."""
    return load_model(str(ROOT / "data/emoji/pipeline"), "cpu", trained=False)


@pytest.fixture
def own(tmp_path):
    """A user's own folder of eight pictures of many colours, without dataset.json."""
    folder, generator = tmp_path / "own/laion_subset", np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    for number in range(8):
        Image.fromarray(generator.integers(0, 256, (40, 44, 3), dtype=np.uint8)).save(
            folder / f"images/{number}.png"
        )
    (folder / "captions.txt").write_text("a cat\n" * 8)
    return tmp_path / "own"


def make_png(width, height, bits, colour, row, before=(), after=()):
    """Bytes of a PNG of equal rows, with chunks [(kind, data), ...] before and after its pixels."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    rows = row if isinstance(row, list) else [row] * height
    chunks = [
        (b"IHDR", header),
        *before,
        (b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows))),
        *after,
        (b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*entry) for entry in chunks)


def make_tiff(width, height, bits, photometric, data, kind=1):
    """Bytes of a TIFF of one channel; kind: 1 unsigned, 2 signed, 3 floating-point."""
    tags = [
        (256, 3, width),
        (257, 3, height),
        (258, 3, bits),
        (259, 3, 1),
        (262, 3, photometric),
        (273, 4, 8),
        (277, 3, 1),
        (278, 3, height),
        (279, 4, len(data)),
        (339, 3, kind),
    ]
    entries = b"".join(struct.pack("<HHII", tag, size, 1, value) for tag, size, value in tags)
    return (
        b"II*\0"
        + struct.pack("<I", 8 + len(data))
        + data
        + struct.pack("<H", len(tags))
        + entries
        + b"\0\0\0\0"
    )


def exif_of(orientation):
    exif = Image.Exif()
    exif[pictures.ORIENTATION] = orientation
    return exif


def colours(image):
    return [tuple(colour) for colour in np.asarray(image).reshape(-1, 3).tolist()]


def turn(path, orientation=6):
    """Marks a picture as turned, and makes nothing else of it."""
    with Image.open(path) as image:
        image.load()
    image.save(path, exif=exif_of(orientation))


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_a_picture_is_turned_as_its_exif_says_in_every_format(form, tmp_path):
    source, path = Image.effect_noise((16, 32), 60).convert("RGB"), tmp_path / "picture"
    for orientation in range(10):
        source.save(path, form, exif=exif_of(orientation))
        with Image.open(path) as image:
            expected = ImageOps.exif_transpose(image).convert("RGB")
        found = load_image(path)
        assert found.size == expected.size == ((32, 16) if 5 <= orientation <= 8 else (16, 32))
        assert colours(found) == colours(expected), orientation


# As EXIF defines them: what is to be done to rows and columns.
ROTATIONS = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: np.rot90,
}
TIFF_MODES = ["1", "L", "P", "LA", "RGB", "RGBA", "CMYK", "I;16"]


@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
@pytest.mark.parametrize("mode", TIFF_MODES)
def test_a_tiff_is_turned_as_it_says_in_every_mode_and_compression(mode, compression, tmp_path):
    values = np.random.default_rng(0).integers(1, 250, (5, 3, 3), dtype=np.uint8)
    path = tmp_path / "t.tif"
    source = (
        Image.fromarray(values[..., 0].astype(np.uint16) * 257)
        if mode == "I;16"
        else Image.fromarray(values).convert(mode)
    )
    if mode in ("LA", "RGBA"):
        source.putalpha(Image.fromarray(values[..., 0]))
    source.save(path, compression=compression)
    plain = np.asarray(load_image(path))
    for orientation, rotate in ROTATIONS.items():
        source.save(path, compression=compression, exif=exif_of(orientation))
        assert (np.asarray(load_image(path)) == rotate(plain)).all(), orientation
        was_wrong = compression is None and orientation >= 5 and mode in pictures.MAPPED
        assert (hash_picture(path) != hash_file(path)) == (
            was_wrong or source.has_transparency_data
        ), orientation


EXIF_CHUNK = (b"eXIf", exif_of(6).tobytes()[6:])
XMP_CHUNK = (b"iTXt", b'XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation="6"/>')


@pytest.mark.parametrize(
    "before, after",
    [((EXIF_CHUNK,), ()), ((), (EXIF_CHUNK,)), ((XMP_CHUNK,), ()), ((), (XMP_CHUNK,))],
)
def test_red_over_blue_turned_by_a_quarter_is_blue_beside_red_wherever_its_png_says_so(
    before, after, tmp_path
):
    path = tmp_path / "picture.png"
    path.write_bytes(make_png(1, 2, 8, 2, [bytes(RED), bytes(BLUE)], before, after))
    assert load_image(path).size == (2, 1) and colours(load_image(path)) == [BLUE, RED]
    assert hash_picture(path) != hash_file(path)


@pytest.mark.parametrize(
    "exif",
    [
        b"junkjunk",
        b"II*\0\xff\xff\xff\xff",
        b"II*\0\x08\0\0\0\x05\0\x00\x01\x03\0\x01\0\0\0",
        b"",
        b"II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x02\0\0\0\x06\0\0\0",
    ],
)
def test_broken_exif_is_read_unturned_and_without_a_warning(exif, tmp_path):
    path = tmp_path / "picture.png"
    path.write_bytes(make_png(1, 2, 8, 2, [bytes(RED), bytes(BLUE)], [(b"eXIf", exif)]))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        importlib.reload(
            pictures
        )  # pytest has put its own filters over those that it sets when it is imported
        assert pictures.load_image(path).size == (1, 2) and colours(pictures.load_image(path)) == [
            RED,
            BLUE,
        ]
        assert pictures.hash_picture(path) == hash_file(path)
    assert not said


GREY = (58, 58, 58)
TRANSPARENT = {
    "RGB and alpha": (
        make_png(2, 1, 8, 6, bytes((95, 130, 194, 0, 95, 130, 194, 255))),
        [WHITE, (95, 130, 194)],
    ),
    "half transparent": (make_png(1, 1, 8, 6, bytes((0, 0, 0, 128))), [(127, 127, 127)]),
    "grey and alpha": (make_png(2, 1, 8, 4, bytes((58, 0, 58, 255))), [WHITE, GREY]),
    "grey and alpha of 16 bits": (
        make_png(2, 1, 16, 4, bytes((58, 1, 0, 0, 58, 1, 255, 255))),
        [WHITE, GREY],
    ),
    "a transparent entry of a palette": (
        make_png(2, 1, 8, 3, b"\0\1", [(b"PLTE", bytes((*RED, *BLUE))), (b"tRNS", b"\0")]),
        [WHITE, BLUE],
    ),
    "alpha of a palette": (
        make_png(2, 1, 8, 3, b"\0\1", [(b"PLTE", bytes((*RED, *BLUE))), (b"tRNS", b"\xff\0")]),
        [RED, WHITE],
    ),
    "a transparent colour": (
        make_png(2, 1, 8, 2, bytes((1, 2, 3, 4, 5, 6)), [(b"tRNS", bytes((0, 1, 0, 2, 0, 3)))]),
        [WHITE, (4, 5, 6)],
    ),
    "a transparent colour of 16 bits": (
        make_png(
            2,
            1,
            16,
            2,
            bytes((1, 0, 2, 0, 3, 0, 4, 0, 5, 0, 6, 0)),
            [(b"tRNS", bytes((1, 0, 2, 0, 3, 0)))],
        ),
        [WHITE, (4, 5, 6)],
    ),
    "a transparent grey": (
        make_png(2, 1, 8, 0, bytes((58, 64)), [(b"tRNS", b"\0\x40")]),
        [GREY, WHITE],
    ),
    "a transparent grey of 16 bits": (
        make_png(2, 1, 16, 0, bytes((58, 1, 58, 2)), [(b"tRNS", bytes((58, 2)))]),
        [GREY, WHITE],
    ),
    "a transparent grey of 4 bits": (
        make_png(2, 1, 4, 0, b"\x3a", [(b"tRNS", b"\0\3")]),
        [WHITE, (170, 170, 170)],
    ),
    "a transparent grey of 2 bits": (
        make_png(4, 1, 2, 0, b"\x1b", [(b"tRNS", b"\0\1")]),
        [(0, 0, 0), WHITE, (170, 170, 170), WHITE],
    ),
    "a transparent black of 1 bit": (
        make_png(2, 1, 1, 0, b"\x40", [(b"tRNS", b"\0\0")]),
        [WHITE, WHITE],
    ),
}


@pytest.mark.parametrize("name", TRANSPARENT)
def test_what_is_transparent_is_shown_on_white_and_gives_no_warning(name, tmp_path):
    content, expected = TRANSPARENT[name]
    (tmp_path / "picture.png").write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image, oddities = read_picture(tmp_path / "picture.png")
    assert colours(image) == expected and "transparent" in oddities
    assert hash_picture(tmp_path / "picture.png") != hash_file(tmp_path / "picture.png")


@pytest.mark.parametrize("suffix", ["tif", "webp", "gif"])
def test_other_formats_are_shown_on_white_too(suffix, tmp_path):
    path = tmp_path / f"picture.{suffix}"
    Image.new("RGBA", (4, 4), (95, 130, 194, 0)).save(
        path, **({"lossless": True, "exact": True} if suffix == "webp" else {})
    )
    assert set(colours(load_image(path))) == {WHITE} and hash_picture(path) != hash_file(path)


def test_alpha_that_is_opaque_everywhere_changes_no_colour_and_is_not_told(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 4), dtype=np.uint8)
    pixels[..., 3] = 255
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    image, oddities = read_picture(tmp_path / "picture.png")
    assert (np.asarray(image) == pixels[..., :3]).all() and not oddities


@pytest.mark.parametrize("suffix", ["gif", "webp", "apng", "tif"])
def test_of_several_frames_or_pages_the_first_is_read_and_it_is_told(suffix, tmp_path):
    first, second = Image.new("RGB", (4, 4), RED), Image.new("RGB", (4, 4), BLUE)
    first.paste(WHITE, (0, 0, 2, 4))
    path = tmp_path / f"picture.{suffix}"
    first.save(
        path,
        "PNG" if suffix == "apng" else None,
        save_all=True,
        append_images=[second],
        **({"lossless": True} if suffix == "webp" else {}),
    )
    image, oddities = read_picture(path)
    assert (np.asarray(image) == np.asarray(first)).all() and oddities == {"frames"}
    first.save(path, "PNG" if suffix == "apng" else None)
    assert read_picture(path)[1] == set()


def test_a_picture_of_one_colour_is_told(tmp_path):
    logo = Image.new("RGBA", (4, 4), (255, 255, 255, 0))
    logo.paste((255, 255, 255, 255), (1, 1, 3, 3))
    logo.save(tmp_path / "logo.png")
    assert read_picture(tmp_path / "logo.png")[1] == {"transparent", "plain"}
    assert list_notes("queries", 1, odd={"plain": ["logo.png"]}) == [
        "1 of 1 queries (logo.png): of one colour all over"
    ]


def pack_12_bits(values):
    return b"".join(
        bytes((a >> 4, (a & 15) << 4 | b >> 8, b & 255)) for a, b in values.reshape(-1, 2).tolist()
    )


RAMPS = {
    "16 bits": lambda path: Image.fromarray(RAMP * 257).save(path, "TIFF"),
    "16 bits, the other byte first": lambda path: Image.fromarray((RAMP * 257).astype(">u2")).save(
        path, "TIFF"
    ),
    "16 bits in 32": lambda path: Image.fromarray(RAMP.astype(np.int32) * 257).save(path, "TIFF"),
    "16 bits, white is 0": lambda path: path.write_bytes(
        make_tiff(256, 2, 16, 0, (65535 - RAMP * 257).astype("<u2").tobytes())
    ),
    "12 bits": lambda path: path.write_bytes(make_tiff(256, 2, 12, 1, pack_12_bits(RAMP * 16))),
    "16 bits of PNG": lambda path: Image.fromarray(RAMP * 257).save(path, "PNG"),
}


@pytest.mark.parametrize("name", RAMPS)
def test_a_ramp_of_more_than_eight_bits_is_the_ramp(name, tmp_path):
    RAMPS[name](tmp_path / "ramp")
    found = np.asarray(load_image(tmp_path / "ramp"))
    assert (found == RAMP[..., None]).all()
    is_read_as_ever = name in ("16 bits", "16 bits, the other byte first", "16 bits of PNG")
    assert (hash_picture(tmp_path / "ramp") == hash_file(tmp_path / "ramp")) == is_read_as_ever


@pytest.mark.parametrize(
    "bits, kind, form, values, said",
    [
        (32, 3, "<ff", (0, 1), "mode F, values from 0 to 1"),
        (32, 3, "<ff", (float("nan"), 1), "mode F, values from nan"),
        (32, 2, "<ii", (-5, 300), "mode I, values from -5 to 300"),
        (32, 2, "<ii", (0, 70_000), "mode I, values from 0 to 70000"),
        (32, 2, "<ii", (0, 255), "mode I, values from 0 to 255"),
        (16, 2, "<hh", (0, 32767), "mode I, values from 0 to 32767"),
    ],
)
def test_numbers_of_which_nothing_says_what_is_white_are_refused_by_their_mode(
    bits, kind, form, values, said, tmp_path
):
    path = tmp_path / "picture.tif"
    path.write_bytes(make_tiff(2, 1, bits, 1, struct.pack(form, *values), kind))
    with pytest.raises(UserError, match="picture.tif: mode ") as error:
        load_image(path)
    assert said in str(error.value) and str(error.value).endswith("save it with 8 or 16 bits")


def test_a_png_with_long_notes_is_read_and_one_that_unfolds_without_end_is_not(tmp_path):
    path = tmp_path / "picture.png"
    for megabytes in 3, 65:
        notes = PngImagePlugin.PngInfo()
        notes.add_text("workflow", "x" * (megabytes << 20), zip=True)
        Image.new("RGB", (2, 2), RED).save(path, pnginfo=notes)
        if megabytes == 3:
            assert colours(load_image(path)) == [RED] * 4 and hash_picture(path) == hash_file(path)
    with pytest.raises(UserError, match="picture.png: cannot be read"):
        load_image(path)


def test_nothing_in_the_package_opens_a_picture_but_by_this_rule():
    opened = {
        name
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and dotted(node.func) == "Image.open"
    }
    assert opened == {"unlearn.datasets.pictures"}


@pytest.mark.parametrize("root", ["data/emoji", "data/emoji_small"])
def test_the_committed_pictures_keep_their_identity(root):
    paths = [path for path in (ROOT / root).rglob("*.png") if path.name != "contact_sheet.png"]
    assert len(paths) > 300 and all(hash_picture(path) == hash_file(path) for path in paths)


def test_what_cannot_be_read_is_hashed_by_its_bytes(tmp_path):
    (tmp_path / "picture.png").write_bytes(b"no picture")
    assert hash_picture(tmp_path / "picture.png") == hash_file(tmp_path / "picture.png")


def fake_latents(model, paths, resolution, mirrored=False, batch_size=20):
    """Latents of the right shape, from the first pixels."""
    size = resolution // model.pipeline.vae_scale_factor
    return torch.stack(
        [
            torch.full((4, size, size), 1 + float(np.asarray(load_image(path)).mean()))
            for path in paths
        ]
    )


@pytest.fixture
def quick(monkeypatch):
    """Encodes no picture."""
    for module in encoding, queries:
        monkeypatch.setattr(module, "encode_images", fake_latents)


def test_a_training_image_that_is_turned_is_encoded_anew_and_ordinary_ones_are_not(
    own, emoji, quick
):
    assert encode_training_set(emoji, own, 32, 8) and not encode_training_set(emoji, own, 32, 8)
    path = own / "laion_subset/images/3.png"
    images = sorted((own / "laion_subset/images").iterdir())
    assert read_identity(own / "laion_latents.npy")["images"] == digest(
        [[image.name, hash_file(image)] for image in images]
    )
    turn(path)
    by_bytes = digest([[image.name, hash_file(image)] for image in images])
    for array in (
        "laion_latents",
        "laion_text_embeddings",
    ):  # as they were made before pictures were turned
        record = own / f"{array}.json"
        record.write_text(
            record.read_text().replace(read_identity(own / f"{array}.npy")["images"], by_bytes)
        )
    assert encode_training_set(emoji, own, 32, 8), "latents of the picture as it lies were taken"
    assert read_identity(own / "laion_latents.npy")["images"] != by_bytes


def test_queries_exemplars_and_measures_of_turned_pictures_get_another_identity(root, model, quick):
    task = load_tasks(PARITY / "fixture/tasks.json", root)[0]

    def identities():
        return [
            encode_query(model, task, root).identity,
            encode_exemplars(model, task, root, 20).identity,
            query_digests([task], root),
            list_readings(
                root,
                SimpleNamespace(
                    paths=sorted((root / "laion_subset/images").iterdir()), ids=list(range(60))
                ),
            ),
        ]

    for path in (
        root / task.synth_image_path,
        task.exemplar_paths[0],
        root / "laion_subset/images/000002.png",
    ):
        turn(path, 3)
    turned = identities()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "describe_reading", lambda path, image: [])
        plain = identities()
    assert (
        all(one != other for one, other in zip(turned, plain))
        and turned[-1] == {2: ["turned as 3"]}
        and plain[-1] == {}
    )


def test_transparent_and_cropped_training_images_are_counted_when_they_are_encoded(
    own, emoji, quick, caplog, monkeypatch
):
    images = own / "laion_subset/images"
    for name in "0.png", "1.png":
        with Image.open(images / name) as image:
            image.load()
        image.putalpha(0 if name == "1.png" else 255)
        image.save(images / name)
    for name in "2.png", "3.png", "5.png", "6.png":
        Image.new("RGB", (60, 40)).save(images / name)
    with caplog.at_level("INFO", "unlearn"):
        encode_training_set(emoji, own, 32, 8)
    assert "1 of 8 training images (1.png): transparent, so shown on white" in caplog.text
    assert (
        "4 of 8 training images (2.png, 3.png, 5.png, ...): a third or more is cut off"
        in caplog.text
    )
    caplog.clear()
    with caplog.at_level("INFO", "unlearn"):
        encode_training_set(emoji, own, 32, 8)
        monkeypatch.setenv("RANK", "1")
        monkeypatch.setenv("WORLD_SIZE", "2")
        encode_training_set(emoji, own, 32, 8)
    assert len(caplog.records) == 1 and "a third or more" in caplog.text, (
        "once a run, of however many processes"
    )


def test_cropped_and_transparent_queries_and_exemplars_are_told_by_name(root, caplog):
    tasks = load_tasks(PARITY / "fixture/tasks.json", root)
    with caplog.at_level("INFO", "unlearn"):
        check_pictures(tasks, root)
    assert not caplog.records
    Image.new("RGB", (640, 360)).save(root / tasks[0].synth_image_path)
    Image.new("RGBA", (40, 40)).save(tasks[0].exemplar_paths[0], "PNG")
    with caplog.at_level("INFO", "unlearn"):
        check_pictures(tasks, root)
    assert (
        f"1 of 2 queries ({tasks[0].synth_image_path}): a third or more is cut off" in caplog.text
    )
    assert (
        f"exemplars ({tasks[0].exemplar_ids(root)[0]}): transparent, so" in caplog.text
        and len(caplog.records) == 4
    )  # two of one colour


def test_exemplars_of_different_models_that_share_a_name_are_all_looked_at(root):
    [task, *_] = load_tasks(PARITY / "fixture/tasks.json", root)
    other = root.resolve() / "exemplar/other/0.png"
    other.parent.mkdir()
    Image.new("RGBA", (40, 40)).save(other)
    first, second = (
        replace(task, exemplar_paths=(path,))
        for path in (other, root.resolve() / "exemplar/tiny/0.png")
    )
    note, _ = examine_pictures([first, second], root)
    assert note.startswith("1 of 2 exemplars (exemplar/other/0.png): transparent, so")
    other.write_bytes(b"no picture")
    for tasks in [first, second], [second, first]:
        with pytest.raises(UserError, match="exemplar/other/0.png: cannot be read"):
            examine_pictures(tasks, root)


@pytest.mark.parametrize(
    "size, expected",
    [
        ((3, 2), True),
        ((40, 60), True),
        ((640, 427), False),
        ((640, 480), False),
        ((2, 1), True),
        ((1, 1), False),
    ],
)
def test_a_third_is_where_a_crop_is_told(size, expected):
    assert is_cropped(size) == expected


def test_a_folder_of_ones_own_takes_the_resolution_that_its_model_was_trained_on(own, emoji, quick):
    args = SimpleNamespace(dataroot=str(own), sd_version=None, device="cpu")
    assert prepare_training_set(emoji, resolved(args)).latents.shape == (2, 8, 4, 8, 8)
    assert read_identity(own / "laion_latents.npy")["resolution"] == 32


@pytest.mark.parametrize(
    "unet, vae, expected",
    [
        (
            {"sample_size": 64},
            {"block_out_channels": [128, 256, 512, 512], "sample_size": 512},
            512,
        ),  # Stable Diffusion 1.4, as published
        (
            {"sample_size": 96},
            {"block_out_channels": [128, 256, 512, 512], "sample_size": 768},
            768,
        ),  # 2.1
        (
            {"sample_size": 16},
            {"block_out_channels": [128, 256, 512, 512], "sample_size": 768},
            128,
        ),  # [AbU]'s own on MSCOCO
        ({"sample_size": [8, 8]}, {"block_out_channels": [32, 48, 64]}, 32),
        ({"sample_size": [8, 4]}, {"block_out_channels": [32]}, None),
        ({"sample_size": None}, {"block_out_channels": [32]}, None),
        ({}, {"block_out_channels": [32]}, None),
        ({"sample_size": 8}, {}, None),
        ({"sample_size": True}, {"block_out_channels": [32]}, None),
        ({"sample_size": -8}, {"block_out_channels": [32]}, None),
        ({"sample_size": 64}, {"block_out_channels": [1] * 100}, None),
        ({"sample_size": []}, {"block_out_channels": [1]}, None),
    ],
)
def test_a_models_own_resolution_is_what_diffusers_takes(unet, vae, expected):
    assert trained_resolution(STABLE_DIFFUSION, unet, vae) == expected


def test_the_published_layout_keeps_512_and_a_model_that_does_not_say_is_named(
    model, root, monkeypatch
):
    assert model.resolution(read_settings(root)) == 512
    monkeypatch.setattr(type(model), "own_resolution", None)
    with pytest.raises(
        UserError, match="sample_size is 16.*give `resolution` in the data root's dataset.json"
    ):
        model.resolution(read_settings(root))


@pytest.mark.parametrize("resolution, told", [(None, False), (32, False), (64, True)])
def test_another_resolution_than_the_models_own_is_told_by_encode_scripts_and_doctor(
    resolution, told, own, emoji, monkeypatch, caplog, capsys
):
    settings = {
        "pipeline": str(ROOT / "data/emoji/pipeline"),
        **({"resolution": resolution} if resolution else {}),
    }
    (own / "dataset.json").write_text(json.dumps(settings))
    monkeypatch.setattr(encode, "load_model", lambda *args, **kwargs: emoji)
    text = (
        "pictures are brought to 64 x 64 pixels, as dataset.json says; the model was trained "
        "on 32 x 32"
    )
    with caplog.at_level("INFO", "unlearn"):
        encode.main(["--dataroot", str(own), "--device", "cpu", "--dry_run"])
        args = SimpleNamespace(dataroot=str(own), sd_version=None, device="cpu", dry_run=True)
        prepare_training_set(emoji, resolved(args))
    assert [line for line in caplog.messages if " -> " not in line] == [text] * 2 * told, (
        "once in each of the two runs"
    )
    findings = examination.examine_resolution(settings["pipeline"], read_settings(own))
    assert findings == [machine.Finding(machine.NOTE, text)] * told


def test_the_doctor_says_where_no_resolution_can_be_had_and_passes_over_what_is_not_there(
    own, tmp_path
):
    pipeline = shutil.copytree(
        ROOT / "data/emoji/pipeline",
        tmp_path / "pipeline",
        ignore=shutil.ignore_patterns("*.safetensors"),
    )
    (pipeline / "unet/config.json").write_text("{}")
    (finding,) = examination.examine_resolution(str(pipeline), read_settings(own))
    assert finding.status == machine.PROBLEM and "dataset.json" in finding.remedy
    for name in str(tmp_path / "none"), "no/such-name", "", "a/b/c":
        assert examination.examine_resolution(name, read_settings(own)) == []


def test_mscoco_and_the_emoji_worlds_are_at_their_models_own_resolution():
    for root, unet, vae in (
        ("mscoco_config", "mscoco_config/unet", {"block_out_channels": [128, 256, 512, 512]}),
        ("emoji", "emoji/pipeline/unet", None),
        ("emoji_small", "emoji_small/unet", None),
    ):
        config = json.loads((ROOT / "data" / unet / "config.json").read_text())
        vae = vae or json.loads((ROOT / "data" / root / "pipeline/vae/config.json").read_text())
        assert (
            trained_resolution(STABLE_DIFFUSION, config, vae)
            == json.loads((ROOT / "data" / root / "dataset.json").read_text())["resolution"]
        )
