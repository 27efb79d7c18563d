"""Makes queries: pictures that a data root's model generates from prompts, each with its own
recorded seed.

    python -m unlearn generate --dataroot data/emoji_small --prompts prompts.txt --name queries --task_json tasks/queries.json

Writes DATAROOT/synth/NAME/{00000.png, ..., latents.npy, embeddings.npy} and the task file. Line i
of the prompts gets seed SEED + i: the same picture on any device. Prompts may also come from a COCO
caption file (--prompts FILE.json).
"""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..datasets.conditioning import TEXT, join_conditioning
from ..datasets.encoders import encode_texts
from ..datasets.own_root import check_root_writable
from ..datasets.preparation import say_resolution
from ..datasets.training_sets import check_pixels
from ..errors import UserError
from ..models.customization import BRACKETED, check_texts, find_strange, open_tokenizer
from ..models.generation import NUM_INFERENCE_STEPS, check_steps, make_pictures, save_picture
from ..models.pipelines import Model
from ..noise import SCHEME, known_answer
from ..runtime.programs import log, progress
from ..storage.artifacts import whole_file, write_array, write_json
from ..storage.hashes import digest
from ..storage.reading import (
    MOST_TEXT,
    check_text,
    read_array,
    read_json,
    read_text,
    resolve_inside,
)
from ..storage.records import keep_complete, record_path, write_record
from .flags import add_flags, make_parser, resolve
from .inputs import load_model


def read_prompts(path: str | Path, limit: int | None) -> list[str]:
    """Prompts, one a line, or the captions of a COCO annotation file, at most `limit` (None: all).
    Raises UserError where there are none or the file is no text."""
    if str(path).endswith(".json"):
        content = read_json(path, "--prompts", MOST_TEXT)
        entries = content.get("annotations") if isinstance(content, dict) else None
        if not isinstance(entries, list) or not all(
            isinstance(entry, dict) and isinstance(entry.get("caption"), str) for entry in entries
        ):
            raise UserError(f"--prompts {path}: expected COCO's caption annotations, found none")
        prompts = [" ".join(entry["caption"].split()) for entry in entries]
    else:
        prompts = [
            line.strip() for line in read_text(path, "--prompts").split("\n") if line.strip()
        ]
    for number, prompt in enumerate(prompts[:limit]):
        check_text(f"--prompts {path}, prompt {number + 1}", prompt)
    if not prompts[:limit]:
        raise UserError(f"--prompts {path}: expected at least one prompt, found none")
    return prompts[:limit]


def check_words(names: dict[str, str], tokenizer: Any) -> None:
    """Raises UserError where one of some prompts, {name: prompt}, has a word like <new1> that is no
    token of the pipeline's."""
    if strange := find_strange(tokenizer, names):
        name, word, meant = strange
        raise UserError(
            f"{name}: {word} is not read as the token {meant}; write {meant}"
            if meant
            else f"{name}: the pipeline has no token {word}; leave it out, or write it without < "
            f"and >"
        )


def make_entries(prompts: Sequence[str], folder: str, args: Namespace) -> list[dict]:
    """Entries of the task file, paths relative to the data root."""
    sampling = {
        "num_inference_steps": args.num_inference_steps,
        "guidance_scale": args.guidance_scale,
    }
    return [
        {
            "synth_image_path": f"{folder}/{row:05d}.png",
            "prompt": prompt,
            "seed": args.seed + row,
            **sampling,
            "latents": f"{folder}/latents.npy",
            "embeddings": f"{folder}/embeddings.npy",
            "row": row,
        }
        for row, prompt in enumerate(prompts)
    ]


def parse_arguments(argv: Sequence[str] | None) -> tuple[Namespace, dict]:
    """The command line, resolved against the data root's defaults: (args, settings)."""
    parser = make_parser(__doc__, "python -m unlearn generate")
    parser.add_argument(
        "--prompts",
        required=True,
        help="text file, one prompt a line, or COCO caption annotations (.json)",
    )
    parser.add_argument("--limit", type=int, help="use the first so many prompts only")
    parser.add_argument(
        "--name", default="queries", help="folder below DATAROOT/synth (default queries)"
    )
    parser.add_argument("--task_json", required=True, help="the task file to write")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first prompt (default 0)")
    parser.add_argument(
        "--num_inference_steps",
        type=int,
        default=NUM_INFERENCE_STEPS,
        help=f"DDIM steps (default {NUM_INFERENCE_STEPS})",
    )
    parser.add_argument(
        "--guidance_scale",
        type=float,
        default=1.0,
        help="classifier-free guidance (default 1: none)",
    )
    parser.add_argument(
        "--batch_size", type=int, default=32, help="pictures made at once; memory only (default 32)"
    )
    add_flags(
        parser, "dataroot", "sd_version", "lora", "weights", "precision", "device", "overwrite"
    )
    args = parser.parse_args(argv)
    return args, resolve(args)


@dataclass(frozen=True)
class Place:
    """Where queries are written."""

    folder: Path  # DATAROOT/synth/NAME
    name: str  # the folder's, relative to the data root

    @property
    def latents(self) -> Path:
        """[queries, C, h, w] float32; its record is that of all files of the folder."""
        return self.folder / "latents.npy"

    @property
    def embeddings(self) -> Path:
        """[queries, tokens, features] float32."""
        return self.folder / "embeddings.npy"

    def picture(self, row: int) -> Path:
        """The picture of a prompt."""
        return self.folder / f"{row:05d}.png"


def choose_place(args: Namespace) -> Place:
    """Where the flags say. Raises UserError where that is outside the data root."""
    folder = resolve_inside(args.dataroot, f"synth/{args.name}", "--name")
    return Place(folder, folder.relative_to(Path(args.dataroot).resolve()).as_posix())


def load_checked(args: Namespace, prompts: Sequence[str]) -> Model:
    """The model that makes the pictures. Raises UserError, where possible before it is loaded, if
    it does not know a token of the prompts."""
    names = {
        f"--prompts {args.prompts}, prompt {number}": prompt
        for number, prompt in enumerate(prompts, 1)
    }
    if any(BRACKETED.search(prompt) for prompt in prompts) and (
        tokenizer := open_tokenizer(args.sd_version)
    ):
        check_words(names, tokenizer)
    model = load_model(args)
    check_words(names, model.word_reader)
    check_texts(model.reader[0], model.word_reader, names)
    check_steps(model, args.num_inference_steps)
    return model


def queries_identity(args: Namespace, settings: dict, model: Model, prompts: Sequence[str]) -> dict:
    """Identity of the queries of a folder."""
    return {
        **model.identity,
        "prompts": digest(prompts),
        "first_seed": args.seed,
        "num_inference_steps": args.num_inference_steps,
        "guidance_scale": args.guidance_scale,
        "resolution": model.resolution(settings),
        "dataset": settings["name"],
        "noise": SCHEME,
        "known_answer": known_answer(),
        "precision": args.precision,
    }


def is_made(place: Place, identity: dict, entries: Sequence[dict], args: Namespace) -> bool:
    """Whether the queries are there, whole. Raises UserError where others stand in the way, or
    other tasks in the task file."""
    is_complete = keep_complete(
        place.latents, identity, args.overwrite, "give --overwrite to replace it, or another --name"
    )
    if (
        not args.overwrite
        and Path(args.task_json).exists()
        and read_json(args.task_json, "--task_json") != entries
    ):
        raise UserError(
            f"--task_json {args.task_json}: holds other tasks; give --overwrite to replace it, "
            f"or another name"
        )
    files = [place.embeddings, *(place.picture(row) for row in range(len(entries)))]
    return (
        is_complete
        and all(map(Path.exists, files))
        and all(
            np.isfinite(read_array(stored, "queries")).all()
            for stored in (place.latents, place.embeddings)
        )
    )


def make_queries(
    place: Place, model: Model, settings: dict, prompts: Sequence[str], args: Namespace
) -> None:
    """Makes the pictures and writes them with their latents and embeddings."""
    resolution = model.resolution(settings)
    texts = join_conditioning(
        [
            encode_texts(model, some, [None] * len(some), resolution)
            for start in range(0, len(prompts), args.batch_size)
            for some in [prompts[start : start + args.batch_size]]
        ]
    )
    conditioning = {name: tensor.numpy() for name, tensor in texts.items()}
    check_pixels("embeddings of the prompts", conditioning[TEXT])
    with progress(len(prompts), "generating", "pictures") as bar:
        latents, pictures = make_pictures(
            model,
            settings["name"],
            conditioning,
            [args.seed + row for row in range(len(prompts))],
            model.latent_shape(resolution),
            args.num_inference_steps,
            args.guidance_scale,
            args.batch_size,
            bar.update,
        )
    record_path(place.latents).unlink(missing_ok=True)
    for row, pixels in enumerate(pictures):
        with whole_file(place.picture(row)) as file:
            save_picture(file, pixels)
    write_array(place.embeddings, conditioning[TEXT])
    write_array(place.latents, latents)


def main(argv: Sequence[str] | None = None) -> None:
    """Checks, loads, generates, writes pictures, arrays and the task file."""
    args, settings = parse_arguments(argv)
    prompts = read_prompts(args.prompts, args.limit)
    place = choose_place(args)
    model = load_checked(args, prompts)
    say_resolution(model, settings)
    identity = queries_identity(args, settings, model, prompts)
    entries = make_entries(prompts, place.name, args)
    if is_made(place, identity, entries, args):
        write_json(args.task_json, entries)
        return log.info(f"{place.folder}: is there already")
    check_root_writable(args.dataroot, "queries", [place.folder])
    make_queries(place, model, settings, prompts, args)
    write_record(place.latents, identity, args.device)
    write_json(args.task_json, entries)
    log.info(f"{place.folder}: {len(prompts)} pictures; task file {args.task_json}")
