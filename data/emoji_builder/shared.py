"""Composes the training images of data/emoji_shared: emoji of data/emoji on coloured squares.

    python -m data.emoji_builder.shared

Each category has two emoji under one name. Each emoji stands on two squares: one picture is
repeated four times an epoch, its twin once. A caption names category and square, so that several
pictures share it. Queries ask for pairs of category and square that no picture has: the square is
learned from eight pictures, the emoji from one or two of other squares. What looks and reads
most like a query is therefore not what taught it.
"""

import shutil
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from unlearn.datasets.captions import list_folder, read_lines

# What training starts from has seen every fourth emoji: none of these.
SOURCE, TARGET = Path("data/emoji/laion_subset"), Path("data/emoji_shared/laion_subset")
CATEGORIES = {
    "face": ("nauseated face", "clown face"),
    "animal": ("pig", "panda"),
    "bird": ("penguin", "flamingo"),
    "fish": ("tropical fish", "octopus"),
    "bug": ("butterfly", "honeybee"),
    "flower": ("rose", "sunflower"),
    "tree": ("christmas tree", "palm tree"),
    "fruit": ("strawberry", "grapes"),
    "food": ("pizza", "hamburger"),
    "drink": ("beer mug", "wine glass"),
    "house": ("castle", "tent"),
    "car": ("police car", "fire engine"),
    "boat": ("sailboat", "speedboat"),
    "ball": ("soccer ball", "volleyball"),
    "music": ("guitar", "drum"),
    "computer": ("laptop", "television"),
}
PROMPTS = Path("tasks/emoji_shared_prompts.txt")
SQUARES = {
    "red": (214, 48, 49),
    "orange": (245, 146, 30),
    "yellow": (250, 221, 60),
    "green": (60, 160, 70),
    "blue": (40, 110, 210),
    "purple": (130, 60, 170),
    "brown": (120, 72, 40),
    "black": (20, 20, 24),
}
REPEATS = (4, 1)  # of an emoji's two pictures
PICTURE_SIZE, EMOJI_SIZE = 64, 48
CANDIDATES_A_PAIR = 16  # pictures made of each pair, of which `shared_queries` chooses
OUTSIDE = (255, 0, 255)


def cut_out(picture: Image.Image) -> tuple[Image.Image, Image.Image]:
    """An emoji of EMOJI_SIZE, and its mask: the white around it is left out."""
    canvas = Image.new("RGB", (picture.width + 2, picture.height + 2), "white")
    canvas.paste(picture, (1, 1))
    ImageDraw.floodfill(canvas, (0, 0), OUTSIDE, thresh=24)
    inside = (np.asarray(canvas)[1:-1, 1:-1] != OUTSIDE).any(axis=-1)
    mask = Image.fromarray(np.where(inside, 255, 0).astype(np.uint8))
    size = (EMOJI_SIZE, EMOJI_SIZE)
    return picture.resize(size, Image.LANCZOS), mask.resize(size, Image.LANCZOS)


def compose(picture: Image.Image, square: str) -> Image.Image:
    """An emoji in the middle of a coloured square."""
    emoji, mask = cut_out(picture)
    canvas = Image.new("RGB", (PICTURE_SIZE, PICTURE_SIZE), SQUARES[square])
    canvas.paste(emoji, ((PICTURE_SIZE - EMOJI_SIZE) // 2,) * 2, mask)
    return canvas


def caption_of(category: str, square: str) -> str:
    """The caption that all pictures of a category on a square share."""
    return f"{square} square with {category}"


def plan_pictures(rng: np.random.Generator) -> tuple[list[tuple], list[tuple]]:
    """The pictures, (emoji, category, square, repeats) each, and the pairs (category, square) that
    no picture has, for queries: more than enough, in random order."""
    pictures, unseen = [], []
    for category, emoji in CATEGORIES.items():
        order = rng.permutation(list(SQUARES))
        # A square for each picture; the others are left to the queries.
        seen, others = order[:4], order[4:]
        for number, name in enumerate(emoji):
            pictures += [
                (name, category, seen[2 * number + step], count)
                for step, count in enumerate(REPEATS)
            ]
        unseen += [(category, square) for square in others]
    return pictures, [unseen[index] for index in rng.permutation(len(unseen))]


def main():
    """Writes data/emoji_shared/laion_subset and the prompts of what may become queries anew."""
    captions, files = read_lines(SOURCE / "captions.txt"), list_folder(SOURCE / "images")
    found = dict(zip(captions, files))
    pictures, unseen = plan_pictures(np.random.default_rng(0))
    shutil.rmtree(TARGET, ignore_errors=True)
    (TARGET / "images").mkdir(parents=True)
    for number, (name, _, square, _) in enumerate(pictures):
        with Image.open(found[name]) as picture:
            composed = compose(picture.convert("RGB"), square)
        composed.quantize(64).save(TARGET / f"images/{number:06d}.png", optimize=True)
    lines = {
        TARGET / "captions.txt": [caption_of(*picture[1:3]) for picture in pictures],
        TARGET / "repeats.txt": [picture[3] for picture in pictures],
        PROMPTS: CANDIDATES_A_PAIR * [caption_of(*pair) for pair in unseen],
    }
    for path, values in lines.items():
        path.write_text("".join(f"{value}\n" for value in values), encoding="utf-8")


if __name__ == "__main__":
    main()
