"""Composes the training images of data/emoji_lora: small folders as people fine-tune on.

    python -m data.emoji_builder.lora

Each folder shows emoji that the base model (data/emoji_small) has never seen, on coloured squares.
Half of the folders have one caption for all pictures, which therefore says nothing; some show
pictures unequally often (kohya's 1_x and 4_x), some have two subjects, and in some a few pictures are
spoiled: there three times, captioned as another one, or with a mark in a corner. Which folders
settings are chosen on, and which are reported, is said here, before anything was trained.
"""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from unlearn.datasets.captions import list_folder, read_lines

from .shared import SQUARES, compose

SOURCE, TARGET, TASKS = Path("data/emoji/laion_subset"), Path("data/emoji_lora"), Path("tasks")
BASE_STEP = 4  # every fourth emoji is one of the base model's
THEMES = {  # between two captions of data/emoji, both among them
    "faces": ("grinning face", "nerd face"),
    "animals": ("rabbit face", "goose"),
    "sea": ("turtle", "bug"),
    "plants": ("cherry blossom", "maple leaf"),
    "food": ("grapes", "pizza"),
    "drinks": ("cookie", "pouring liquid"),
    "vehicles": ("high-speed train", "sailboat"),
    "weather": ("watch", "snowman"),
    "sports": ("soccer ball", "teddy bear"),
    "clothes": ("glasses", "ring"),
    "music": ("loudspeaker", "flute"),
    "office": ("telephone", "light bulb"),
    "tools": ("straight ruler", "telescope"),
    "hands": ("sweat droplets", "folded hands"),
}
COPIES, SPOILED, MARKED = 3, 3, 6  # copies of a picture; wrong captions or copied pictures; marks
MARK = (230, 0, 230)
NUM_QUERIES = 10
SAMPLES, BATCH, RANK = 960, 8, 4  # images that a training sees, at once, and the LoRA's rank


@dataclass(frozen=True)
class Plan:
    """One folder."""

    name: str
    subjects: tuple[str, ...]  # of THEMES
    count: int  # emoji
    trigger: str = ""  # the caption of all; "": each its own
    repeats: tuple[int, ...] = (1,)  # of its parts
    fault: str = ""  # copies, captions or marks
    tuning: bool = False


PLANS = [
    Plan("faces", ("faces",), 24, trigger="sks emoji", tuning=True),
    Plan("food", ("food",), 24, repeats=(1, 4), fault="copies", tuning=True),
    Plan("tools", ("tools",), 20, fault="captions", tuning=True),
    Plan("pets", ("animals", "vehicles"), 24, trigger="sks emoji", fault="marks", tuning=True),
    Plan("hands", ("hands",), 20, trigger="sks emoji", repeats=(1, 4)),
    Plan("clothes", ("clothes",), 24, fault="captions"),
    Plan("sports", ("sports",), 24, trigger="sks emoji", fault="marks"),
    Plan("plants", ("plants", "drinks"), 16, fault="copies"),
    Plan("weather", ("weather",), 24, trigger="sks emoji"),
    Plan("vehicles", ("vehicles",), 24, repeats=(1, 4), fault="captions"),
    Plan("desk", ("music", "office"), 30, trigger="sks emoji", repeats=(1, 4), fault="marks"),
    Plan("sea", ("sea",), 12, fault="copies"),
]


@dataclass
class Picture:
    """A picture of a folder."""

    emoji: str
    square: str
    caption: str
    repeats: int
    subject: str
    spoiled: str = ""


def list_emoji(subject: str) -> list[str]:
    """Captions of a theme's emoji that the base model has not seen."""
    captions = read_lines(SOURCE / "captions.txt")
    first, last = (captions.index(name) for name in THEMES[subject])
    return [captions[row] for row in range(first, last + 1) if row % BASE_STEP]


def caption_of(emoji: str, square: str) -> str:
    """A picture's caption, where each has its own."""
    return f"{emoji} on a {square} square"


def plan_pictures(plan: Plan, rng: np.random.Generator) -> list[Picture]:
    """The pictures of a folder, in the order of their files."""
    pictures, squares = [], rng.permutation(list(SQUARES))[:4]
    share = plan.count // len(plan.subjects)
    for subject in plan.subjects:
        for number, emoji in enumerate(rng.permutation(list_emoji(subject))[:share]):
            square = str(rng.choice(squares))
            repeats = plan.repeats[number % len(plan.repeats)]
            caption = plan.trigger or caption_of(emoji, square)
            pictures.append(Picture(str(emoji), square, caption, repeats, subject))
    spoil(plan, pictures, rng)
    return pictures


def spoil(plan: Plan, pictures: list[Picture], rng: np.random.Generator) -> None:
    """Spoils a few pictures of a folder, as its plan says."""
    chosen = rng.permutation(len(pictures))
    if plan.fault == "marks":
        for row in chosen[:MARKED]:
            pictures[row].spoiled = "mark"
    if plan.fault == "captions":  # what a caption says is in no other picture
        for row in chosen[:SPOILED]:
            others = set(list_emoji(plan.subjects[0])) - {picture.emoji for picture in pictures}
            said = str(rng.choice(sorted(others)))
            pictures[row].caption = caption_of(said, pictures[row].square)
            pictures[row].spoiled = "caption"
    if plan.fault == "copies":
        for row in chosen[:SPOILED]:
            pictures[row].spoiled = "copy"
            pictures += [pictures[row]] * (COPIES - 1)


def draw(picture: Picture, source: Path, number: int) -> Image.Image:
    """A picture, of other numbers of colours than its copies, which are then not the same bytes
    where the emoji has so many."""
    with Image.open(source) as emoji:
        made = compose(emoji.convert("RGB"), picture.square)
    if picture.spoiled == "mark":
        ImageDraw.Draw(made).rectangle((44, 44, 63, 63), fill=MARK)
    return made.quantize(64 - number % 7)


def write_folder(plan: Plan, rng: np.random.Generator) -> None:
    """Writes the data root of a folder: kohya's subfolders of pictures with captions beside them."""
    root, pictures = TARGET / plan.name, plan_pictures(plan, rng)
    sources = dict(zip(read_lines(SOURCE / "captions.txt"), list_folder(SOURCE / "images")))
    shutil.rmtree(root, ignore_errors=True)
    entries = []
    for number, picture in enumerate(pictures):
        name = f"{picture.repeats}_{picture.subject}/{number:03d}.png"
        path = root / "laion_subset/images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        draw(picture, sources[picture.emoji], number).save(path, optimize=True)
        path.with_suffix(".txt").write_text(f"{picture.caption}\n", encoding="utf-8")
        entries.append((name, picture))
    entries.sort(key=lambda entry: entry[0])  # as the data root orders them
    lines = [json.dumps({"file_name": name, "text": each.caption}) for name, each in entries]
    write_lines(root / "laion_subset/metadata.jsonl", lines)
    write_lines(root / "laion_subset/repeats.txt", [each.repeats for _, each in entries])
    spoiled = {name: each.spoiled for name, each in entries if each.spoiled}
    write_json(root / "spoiled.json", spoiled)
    write_json(root / "dataset.json", settings_of(plan, [each for _, each in entries]))
    os.symlink("../../emoji/pipeline", root / "pipeline")
    os.symlink("../../emoji_small/unet", root / "unet")
    write_lines(root / "prompts.txt", list_prompts(plan, pictures, rng))


def settings_of(plan: Plan, pictures: list[Picture]) -> dict:
    """The settings of a folder's data root."""
    return {
        "name": f"emoji_lora/{plan.name}",
        "pipeline": "pipeline",
        "unet": "unet",
        "lora": ["lora.safetensors"],
        "resolution": 32,
        "captions": "laion_subset/metadata.jsonl",
        "repeats": "laion_subset/repeats.txt",
        "unlearn_grad_accum_steps": 25,
        "train_epochs": round(SAMPLES / sum(picture.repeats for picture in pictures)),
        "train_lr": 0.02,
        "train_batch_size": BATCH,
        "train_schedule": "linear",
        "train_lora_rank": RANK,
        "train_lora_targets": "linear",
    }


def list_prompts(plan: Plan, pictures: list[Picture], rng: np.random.Generator) -> list[str]:
    """Prompts of a folder's queries: the caption of all, or captions of spoiled pictures, of others,
    and of emoji on squares that no picture shows together."""
    if plan.trigger:
        return [plan.trigger] * NUM_QUERIES
    spoiled = list(dict.fromkeys(each.caption for each in pictures if each.spoiled))
    order = [pictures[row] for row in rng.permutation(len(pictures))]
    others = [each.caption for each in order if not each.spoiled]
    squares = sorted({each.square for each in pictures})
    unseen = [
        caption_of(each.emoji, square)
        for each in order
        for square in squares
        if not each.spoiled and caption_of(each.emoji, square) not in others
    ]
    half = NUM_QUERIES // 2
    own = [*spoiled, *others][:half]
    return own + [str(text) for text in rng.permutation(unseen)[: NUM_QUERIES - half]]


def write_lines(path: Path, values: list) -> None:
    """Writes a text file, a value a line."""
    path.write_text("".join(f"{value}\n" for value in values), encoding="utf-8")


def write_json(path: Path, value: object) -> None:
    """Writes a JSON file."""
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def main():
    """Writes data/emoji_lora anew, without what is trained, and the list of its folders."""
    for number, plan in enumerate(PLANS):
        write_folder(plan, np.random.default_rng([1, number]))
    split = {
        kind: [plan.name for plan in PLANS if plan.tuning == (kind == "tuning")]
        for kind in ("tuning", "reported")
    }
    write_json(TARGET / "folders.json", split)


if __name__ == "__main__":
    main()
