"""Reads captioned emoji pictures out of the Noto colour emoji font.

Captions are Unicode's own short names (emoji-test.txt): unlike the code charts' names they call a
red heart red ("red heart", not "heavy black heart").
"""

import io
import re
import unicodedata
from dataclasses import dataclass

from fontTools.ttLib import TTFont
from PIL import Image

SKIN_TONES = range(0x1F3FB, 0x1F400)
VARIATION_SELECTOR = 0xFE0F
# Hundreds of near copies would drown every other picture: flags, and families in all their
# compositions.
LEFT_OUT = re.compile(
    r"^(flag: |family: |kiss: |couple with heart: )|skin tone|hair$|: beard$|: bald$"
)


@dataclass(frozen=True)
class Emoji:
    """One emoji: its code points without variation selectors, and its caption."""

    codepoints: tuple[int, ...]
    caption: str


def clean_caption(name):
    """`Japanese “here” button` -> `japanese here button`: lower case, letters, digits and single
    blanks."""
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    return " ".join(re.sub(r"[^a-z0-9#*-]+", " ", plain.lower().replace("&", "and")).split())


def read_emoji_names(emoji_test_path):
    """Emoji of Unicode's emoji-test.txt in its order, without skin tones, flags and families."""
    emoji = []
    with open(emoji_test_path, encoding="utf-8") as file:
        for line in file:
            match = re.match(r"([0-9A-F ]+?)\s*; fully-qualified\s+# \S+ E[\d.]+ (.*)", line)
            if match is None or LEFT_OUT.search(match[2]):
                continue
            codepoints = [int(text, 16) for text in match[1].split()]
            if not any(codepoint in SKIN_TONES for codepoint in codepoints):
                codepoints = tuple(
                    codepoint for codepoint in codepoints if codepoint != VARIATION_SELECTOR
                )
                emoji.append(Emoji(codepoints, clean_caption(match[2])))
    return emoji


def read_ligatures(font):
    """Glyph name sequence -> glyph name, for the font's emoji sequences (GSUB lookup type 4)."""
    ligatures = {}
    for lookup in font["GSUB"].table.LookupList.Lookup:
        for subtable in lookup.SubTable:
            subtable = getattr(subtable, "ExtSubTable", subtable)
            if subtable.LookupType == 4:
                for first, candidates in subtable.ligatures.items():
                    for ligature in candidates:
                        ligatures[(first, *ligature.Component)] = ligature.LigGlyph
    return ligatures


def render_emoji(font_path, emoji, size):
    """Draws every emoji that the font has on white. Returns pairs (Emoji, RGB image of `size` x
    `size` pixels)."""
    font = TTFont(font_path)
    cmap, ligatures, bitmaps = font.getBestCmap(), read_ligatures(font), font["CBDT"].strikeData[0]
    drawn = []
    for one in emoji:
        glyphs = tuple(cmap.get(codepoint) for codepoint in one.codepoints)
        glyph = glyphs[0] if len(glyphs) == 1 else ligatures.get(glyphs)
        if glyph in bitmaps:
            bitmap = Image.open(io.BytesIO(bitmaps[glyph].imageData)).convert("RGBA")
            side = max(bitmap.size)
            canvas = Image.new("RGB", (side, side), "white")
            canvas.paste(bitmap, ((side - bitmap.width) // 2, (side - bitmap.height) // 2), bitmap)
            drawn.append((one, canvas.resize((size, size), Image.LANCZOS)))
    return drawn


def save_small_png(image, path):
    """Writes an image as a 128-colour palette PNG: half the bytes, no visible difference at this
    size."""
    image.quantize(128).save(path, optimize=True)
