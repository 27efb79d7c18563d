"""Fonts for captions of every script, as far as the machine has them."""

import shutil
import subprocess
from functools import cache

from PIL import Image, ImageDraw, ImageFont

from ..runtime.printing import printable

NO_CHARACTER = "\ue000"  # for private use: a font shows what it shows for all that it lacks


def draw(font: ImageFont.FreeTypeFont, character: str) -> bytes:
    """A character's picture."""
    image = Image.new("L", (64, 64))
    ImageDraw.Draw(image).text((8, 8), character, 255, font)
    return image.tobytes()


@cache
def lacks(font: ImageFont.FreeTypeFont, character: str) -> bool:
    """Whether a font has no picture of a character."""
    return draw(font, character) == draw(font, NO_CHARACTER)


@cache
def list_fonts(character: str) -> list[str]:
    """Files of the machine's fonts that have a character, by fontconfig; [] without it. Of many, a
    plain one first."""
    if not shutil.which("fc-list"):
        return []
    asked = ["fc-list", f":charset={ord(character):x}", "file"]
    found = subprocess.run(asked, capture_output=True, text=True, errors="replace").stdout
    files = sorted(line.rstrip(": ") for line in found.splitlines())
    plain = [file for file in files if "Regular" in file and "Mono" not in file]
    return [*plain, *files][:20]


@cache
def open_font(file: str, size: int) -> ImageFont.FreeTypeFont | None:
    """A font, None where it cannot be opened in this size, as bitmap fonts cannot."""
    try:
        return ImageFont.truetype(file, size)
    except OSError:
        return None


@cache
def default_font(size: int) -> ImageFont.FreeTypeFont:
    """Pillow's own, which has Latin letters."""
    return ImageFont.load_default(size)  # pyright: ignore[reportReturnType]  # with FreeType


def find_font(text: str, size: int) -> ImageFont.FreeTypeFont:
    """Pillow's own font where it has all of a text's characters, else the machine's font that lacks
    the fewest."""
    best, characters = default_font(size), list(dict.fromkeys(printable(text)))
    missing = [character for character in characters if lacks(best, character)]
    fewest = len(missing)
    for character in missing[:5]:
        for file in list_fonts(character):
            font = open_font(file, size)
            if font is None:
                continue
            left = sum(lacks(font, other) for other in characters)
            if left < fewest:
                best, fewest = font, left
            if not fewest:
                return best
    return best
