"""The picture of a result: the query and its most influential training images."""

from collections.abc import Sequence
from typing import Any

from PIL import Image, ImageDraw

from ..datasets.boxes import Box, name_box
from ..runtime.printing import printable
from .fonts import find_font

TILE, GAP, CAPTION_HEIGHT = 192, 22, 52
EXEMPLAR_RED, INK, PAPER = (220, 30, 40), (30, 30, 30), "white"


def wrap_text(draw: ImageDraw.ImageDraw, text: str, font: Any, width: int, lines: int) -> str:
    """`text` in at most `lines` lines that fit `width` pixels; the last ends in an ellipsis where
    text is left over."""
    rows, words = [], [printable(word) for word in text[:500].split()]  # more than fits any tile
    while words and len(rows) < lines:
        row = words.pop(0)
        while words and draw.textlength(f"{row} {words[0]}", font) <= width:
            row += f" {words.pop(0)}"
        rows.append(row)
    if words:
        rows[-1] += " …"
    for index, row in enumerate(rows):
        while draw.textlength(row, font) > width and len(row) > 2:
            row = row[:-2] + "…"
        rows[index] = row
    return "\n".join(rows)


def draw_tile(
    sheet: Image.Image,
    left: int,
    top: int,
    image: Image.Image | None,
    text: str,
    framed: bool,
    box: Box | None = None,
) -> None:
    """Draws one picture (None: an empty tile) with its text below, framed in red where it is an
    exemplar. box: of its pixels, outlined."""
    draw, font = ImageDraw.Draw(sheet), find_font(text, 15)
    if image is not None:
        scale = TILE / max(image.size)
        # Small pictures are enlarged without smoothing: blurring 32 pixels would show what is not
        # there.
        filter = Image.Resampling.NEAREST if scale >= 3 else Image.Resampling.LANCZOS
        image = image.resize(
            (max(1, round(image.width * scale)), max(1, round(image.height * scale))), filter
        )
        place = left + (TILE - image.width) // 2, top + (TILE - image.height) // 2
        sheet.paste(image, place)
        if box:
            edges = [round(place[axis % 2] + scale * pixel) for axis, pixel in enumerate(box)]
            draw.rectangle(edges, outline=PAPER, width=4)
            draw.rectangle(edges, outline=INK, width=2)
    else:
        draw.rectangle((left, top, left + TILE, top + TILE), fill=(235, 235, 235))
    if framed:
        draw.rectangle(
            (left - 5, top - 5, left + TILE + 4, top + TILE + 4), outline=EXEMPLAR_RED, width=5
        )
    draw.multiline_text(
        (left, top + TILE + 8), wrap_text(draw, text, font, TILE, 3), INK, font, spacing=2
    )


def draw_influence(
    query: Image.Image | None,
    prompt: str,
    candidates: Sequence[tuple[Image.Image | None, str, bool]],
    warnings: Sequence[str] = (),
    columns: int = 5,
    box: Box | None = None,
) -> Image.Image:
    """The query at the left, its most influential images in rows beside it, and below them what
    there is to warn of. box: of the query's pixels, where only these count.

    query: RGB image; candidates: [(RGB image or None, text, is_exemplar), ...], most influential
    first; warnings: sentences. Returns an RGB image.
    """
    rows = max(1, -(-len(candidates) // columns))
    cell = TILE + GAP, TILE + CAPTION_HEIGHT + GAP
    size = 2 * GAP + (min(columns, len(candidates)) + 1) * cell[0] + 2 * GAP, GAP + rows * cell[1]
    sheet = Image.new("RGB", size, PAPER)
    if warnings:
        draw, font = ImageDraw.Draw(sheet), find_font(" ".join(warnings), 17)
        text = "\n".join(
            wrap_text(draw, f"Warning: {warning}.", font, size[0] - 2 * GAP, 6)
            for warning in warnings
        )
        left, top, _, bottom = draw.multiline_textbbox((GAP, size[1]), text, font, spacing=6)
        sheet = Image.new("RGB", (size[0], int(bottom) + GAP), PAPER)
        ImageDraw.Draw(sheet).multiline_text((GAP, size[1]), text, EXEMPLAR_RED, font, spacing=6)
    asked = f"query, {name_box(box)}" if box else "query"
    draw_tile(sheet, GAP, GAP, query, f"{asked}: {prompt}", False, box)
    for number, (image, text, is_exemplar) in enumerate(candidates):
        row, column = divmod(number, columns)
        draw_tile(
            sheet, 3 * GAP + (column + 1) * cell[0], GAP + row * cell[1], image, text, is_exemplar
        )
    return sheet


def draw_grid(
    header: Sequence[str], rows: Sequence[Sequence[tuple[Image.Image | None, str]]]
) -> Image.Image:
    """A table of pictures.

    header: texts of the columns; rows: [[(RGB image or None, text), ...], ...], one entry a column.
    Returns an RGB image.
    """
    cell, top = (TILE + GAP, TILE + CAPTION_HEIGHT), CAPTION_HEIGHT
    sheet = Image.new("RGB", (GAP + len(header) * cell[0], top + len(rows) * cell[1]), PAPER)
    draw, font = ImageDraw.Draw(sheet), find_font(" ".join(header), 15)
    for column, text in enumerate(header):
        draw.multiline_text(
            (GAP + column * cell[0], GAP // 2),
            wrap_text(draw, text, font, TILE, 2),
            INK,
            font,
            spacing=2,
        )
    for number, row in enumerate(rows):
        for column, (image, text) in enumerate(row):
            draw_tile(sheet, GAP + column * cell[0], top + number * cell[1], image, text, False)
    return sheet
