"""How a picture is read, wherever one is: upright, as its EXIF says; on white, where it is
transparent; 16 bits of grey as 8."""

import os
import struct
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np
from PIL import Image, ImageFile, PngImagePlugin

from ..errors import UserError
from ..storage.hashes import digest, hash_file

LARGEST_IMAGE = (
    200_000_000  # pixels; a picture that unfolds to more is refused (decompression bomb)
)
Image.MAX_IMAGE_PIXELS = (
    LARGEST_IMAGE // 2
)  # Pillow warns above this and refuses above twice as many
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = (
    64 << 20
)  # bytes; Pillow's 1 MB is less than some programs' notes
warnings.filterwarnings(
    "ignore", module=r"PIL\."
)  # of what a file says beside its pixels, a line each time that it is read
FORMATS = (
    "PNG",
    "JPEG",
    "WEBP",
    "BMP",
    "GIF",
    "TIFF",
)  # not all of Pillow's: EPS would be run by Ghostscript
ODDITIES = {  # of a picture, and what is said of it
    "transparent": "transparent, so shown on white",
    "frames": "of several frames or pages, of which only the first is used",
    "plain": "of one colour all over",
}
LARGEST_ASPECT = 200  # a longer strip would unfold when its shorter side is resized
ORIENTATION, BITS, PHOTOMETRIC, WHITE_IS_ZERO = 274, 258, 262, 0  # tags of EXIF and TIFF
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
MAPPED = {
    "L",
    "P",
    "RGBX",
    "RGBA",
    "CMYK",
    "I;16",
    "I;16L",
    "I;16B",
}  # modes of which Pillow maps plain pixels into memory
KEY_SCALES = {  # a PNG's transparent value on the scale of its pixels, by their mode in the file
    "1": lambda value: 255 if value else 0,
    "L;2": lambda value: value * 85 if value < 4 else value,
    "L;4": lambda value: value * 17 if value < 16 else value,
    "RGB;16B": lambda value: value >> 8,
}


@contextmanager
def open_picture(path: str | Path | BinaryIO) -> Iterator[ImageFile.ImageFile]:
    """An image of which only the header is read yet. Raises UserError where it is missing,
    truncated or no image, then or in the course of the `with` block."""
    if isinstance(path, (str, Path)) and os.path.lexists(path) and not os.path.isfile(path):
        raise UserError(f"image {path}: a folder, pipe, device or broken link, not a file")
    try:
        with Image.open(path, formats=FORMATS) as image:
            if max(image.size) > LARGEST_ASPECT * min(image.size):
                raise UserError(
                    f"image {path}: {image.width} x {image.height} pixels; at most "
                    f"{LARGEST_ASPECT} times as long as wide"
                )
            if image.format == "TIFF":
                # else Pillow maps the file into memory with the size that it has when turned: rows
                # of a wrong length
                image.filename = ""
            yield image
    except FileNotFoundError:
        raise UserError(f"image {path}: no such file") from None
    except Image.DecompressionBombError:
        raise UserError(
            f"image {path}: more than {LARGEST_IMAGE:,} pixels (a decompression bomb?)"
        ) from None
    except (UserError, MemoryError):
        raise
    except Exception as error:  # a damaged file may raise anything
        raise UserError(f"image {path}: cannot be read, it may be truncated ({error})") from None


def load_image(path: str | Path | BinaryIO) -> Image.Image:
    """Reads an image as RGB. Raises UserError where it is missing, truncated, no image, or of
    numbers without a known range."""
    return read_picture(path)[0]


def read_picture(path: str | Path | BinaryIO) -> tuple[Image.Image, set[str]]:
    """(RGB image, which of ODDITIES it has). Raises UserError as `load_image` does."""
    oddities = set()
    with open_picture(path) as image:
        if (
            image.format != "MPO" and getattr(image, "n_frames", 1) > 1
        ):  # a phone's MPO holds previews of the same picture
            oddities.add("frames")
            image.seek(0)
        scale_key(image)
        image.load()
        turn = TURNS.get(read_orientation(image))
        if image.mode[0] in "IF":
            image = eight_bits(path, image)
        if image.has_transparency_data:
            image = (
                image.convert("LA").convert("RGBA") if image.mode == "La" else image.convert("RGBA")
            )
            alpha = cast(tuple[float, float], image.getchannel("A").getextrema())  # of one channel
            oddities |= {"transparent"} if alpha[0] < 255 else set()
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB")
        colours = cast(tuple[tuple[int, int], ...], image.getextrema())  # of three channels
        oddities |= {"plain"} if all(low == high for low, high in colours) else set()
        return image if turn is None else image.transpose(turn), oddities


def read_orientation(image: Image.Image) -> int:
    """How EXIF, or XMP, says that a picture is to be turned: 1 to 8; 1 where it says nothing or is
    broken. Pillow itself turns TIFF when its pixels are loaded."""
    try:
        # Not PNG's own getexif, which would decode the picture.
        found = Image.Image.getexif(image).get(ORIENTATION, 1)
        return found if found in TURNS else 1
    except Exception:  # broken EXIF may raise anything
        return 1


def scale_key(image: ImageFile.ImageFile) -> None:
    """Brings the transparent value of a PNG to the scale of its pixels, in place: Pillow leaves it
    as in the file, but spreads pixels of 1, 2 and 4 bits over 8, and reads the upper 8 of colours
    of 16."""
    if (
        image.format == "PNG"
        and image.mode != "P"
        and "transparency" in image.info
        and (scale := KEY_SCALES.get(str(image.tile[0][3])))
    ):
        key = image.info["transparency"]
        image.info["transparency"] = (
            tuple(map(scale, key)) if isinstance(key, tuple) else scale(key)
        )


def eight_bits(path: str | Path | BinaryIO, image: Image.Image) -> Image.Image:
    """A grey picture of integers as "L", or as "LA" where one of its values is transparent. Raises
    UserError where white has no known value: floating-point numbers, signed ones of 16 bits, and
    those of 32 bits that need more than 16, or fit into 8."""
    values, bits = np.asarray(image), grey_bits(image)
    if not bits:
        smallest, largest = float(values.min()), float(values.max())
        if (
            image.mode == "F"
            or tiff_tag(image, BITS) == 16
            or smallest < 0
            or not (255 < largest < 65536 or largest == 0)
        ):
            raise UserError(
                f"image {path}: mode {image.mode}, values from {smallest:.6g} to {largest:.6g}, "
                f"and nothing says which is "
                "white; save it with 8 or 16 bits"
            )
        bits = 16
    grey = (values >> (bits - 8)).astype(np.uint8)
    grey = Image.fromarray(255 - grey if tiff_tag(image, PHOTOMETRIC) == WHITE_IS_ZERO else grey)
    if "transparency" in image.info:
        grey.putalpha(
            Image.fromarray(np.where(values == image.info["transparency"], 0, 255).astype(np.uint8))
        )
    return grey


def grey_bits(image: Image.Image) -> int | None:
    """How many bits the values of an image of integers have; None where its mode does not say."""
    return tiff_tag(image, BITS, 16) if image.mode.startswith("I;16") else None


def tiff_tag(image: Image.Image, tag: int, default: int | None = None) -> Any:
    """A tag of a TIFF, its first number; `default` where the image is none, or lacks it."""
    value = getattr(image, "tag_v2", {}).get(tag, default)
    return value[0] if isinstance(value, tuple) else value


class Picture(NamedTuple):
    """What is known of a picture without decoding it."""

    content: (
        str  # hash of the file's bytes and, where they are not read plainly, of how they are read
    )
    is_cropped: bool  # whether the square in its centre leaves out a third of it or more


def inspect_picture(path: str | Path) -> Picture:
    """A file's Picture; of one that cannot be read, by its bytes alone."""
    content, (reading, cropped) = hash_file(path), read_header(path)
    return Picture(digest(content, reading) if reading else content, cropped)


def hash_picture(path: str | Path) -> str:
    """Hash of a picture as it is read: of its bytes (`hash_file`), so that what was made of
    ordinary pictures stays valid; for those that are turned, transparent or of more bits, also of
    that."""
    return inspect_picture(path).content


def read_header(path: str | Path) -> tuple[list[str], bool]:
    """(how the rule reads a file, [] where plainly; whether it is cropped), ([], False) where it
    cannot be read."""
    try:
        with open_picture(path) as image:
            return describe_reading(path, image), is_cropped(image.size)
    except UserError:
        return [], False


def describe_reading(path: str | Path, image: ImageFile.ImageFile) -> list[str]:
    """How the rule reads an image that is not plain, [] where it is. A transparent picture may turn
    out to be opaque all over: only its pixels tell."""
    if image.format == "PNG" and "exif" not in image.info and has_late_metadata(path):
        image.load()
    orientation, reading = read_orientation(image), []
    if orientation > 1 and (image.format != "TIFF" or was_scrambled(image, orientation)):
        reading.append(f"turned as {orientation}")
    if image.has_transparency_data:
        reading.append("on white")
    if image.mode[0] in "IF" and (
        grey_bits(image) != 16 or tiff_tag(image, PHOTOMETRIC) == WHITE_IS_ZERO
    ):
        reading.append("its own bits")
    return reading


def was_scrambled(image: ImageFile.ImageFile, orientation: int) -> bool:
    """Whether a TIFF was read wrongly before Pillow was kept from mapping it (`open_picture`);
    others keep their identity."""
    return (
        orientation >= 5
        and len(image.tile) == 1
        and image.tile[0][0] == "raw"
        and (image.tile[0][3] or [None])[0] == image.mode in MAPPED
    )


def has_late_metadata(path: str | Path) -> bool:
    """Whether a PNG says after its pixels how it is to be turned."""
    with open(path, "rb") as file:
        file.seek(8)
        is_late = False
        while len(header := file.read(8)) == 8:
            size, kind = struct.unpack(">I4s", header)
            is_late = is_late or kind == b"IDAT"
            start = file.tell()
            if is_late and (
                kind == b"eXIf"
                or kind in (b"tEXt", b"zTXt", b"iTXt")
                and file.read(min(size, 21)).startswith(
                    (b"Raw profile type exif", b"XML:com.adobe.xmp")
                )
            ):
                return True
            file.seek(start + size + 4)
    return False


def is_cropped(size: tuple[int, int]) -> bool:
    """Whether the square in the centre leaves out a third of a picture or more."""
    return 2 * max(size) >= 3 * min(size)


def list_notes(
    kind: str,
    total: int,
    cropped: Sequence[str] = (),
    odd: Mapping[str, Sequence[str]] | None = None,
    most: int = 3,
) -> list[str]:
    """Lines on pictures that are not seen as they stand in their files; `most` names in each. odd:
    {one of ODDITIES: names}."""

    def count(names):
        return (
            f"{len(names)} of {total} {kind} "
            f"({', '.join(names[:most])}{', ...' if len(names) > most else ''})"
        )

    notes = [
        f"{count(odd[oddity])}: {text}"
        for oddity, text in ODDITIES.items()
        if odd and odd.get(oddity)
    ]
    if cropped:
        notes.append(
            f"{count(cropped)}: a third or more is cut off, because only the square in the "
            f"centre is used; where what counts is at "
            "an edge, crop it yourself"
        )
    return notes
