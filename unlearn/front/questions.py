"""What is asked: pictures from anywhere and how they were made, as the tasks of a data root."""

import fcntl
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ..datasets.boxes import Box, check_inside
from ..datasets.metadata import read_generation
from ..datasets.pictures import read_picture
from ..datasets.presence import check_pictures
from ..datasets.roots import file_name
from ..datasets.tasks import Task, load_tasks, read_list
from ..errors import UserError
from ..runtime.printing import UNSAFE, shorten
from ..runtime.programs import say
from ..storage.artifacts import open_plain, whole_file, write_json
from ..storage.hashes import digest, hash_file
from ..storage.reading import check_name, check_text

KEY = "_made_of"  # of a task: its picture's bytes and its prompt, so that it is known again


@dataclass(frozen=True)
class Question:
    """A picture and how it was made."""

    picture: Path
    prompt: str
    seed: int | None = None
    steps: int | None = None
    guidance: float | None = None
    latents: str | None = None  # where the model made it here: arrays, below the data root
    embeddings: str | None = None
    box: Box | None = None  # what of the picture counts; None: all

    @property
    def key(self) -> str:
        """What tells two questions apart."""
        box = [list(self.box)] if self.box else []
        return digest(hash_file(self.picture), self.prompt, *box)[:16]


def check_given(prompt: str | None, seed: int | None) -> None:
    """Raises UserError where a prompt or a seed is none."""
    if prompt is not None:
        check_text("--prompt", prompt)
        if not prompt.strip():
            raise UserError('--prompt: expected some words, found none; give it: --prompt "..."')
    if seed is not None and not 0 <= seed < 2**63:
        raise UserError(f"--seed {seed}: expected a whole number from 0 to 2^63 - 1")


def ask(
    picture: str | Path,
    prompt: str | None = None,
    seed: int | None = None,
    box: Box | None = None,
) -> Question:
    """The question that a picture is, with what its file says of how it was made; what is given
    counts first. box: what of the picture counts. Raises UserError where it cannot be read, has no
    prompt, or does not hold the box."""
    path = Path(picture)
    check_name("picture", path)
    check_pictures([path])
    image, _ = read_picture(path)
    if box:
        check_inside(box, image.size, str(path))
    found = read_generation(path)
    words = prompt if prompt is not None else found.prompt
    if not words:
        raise UserError(f'{path}: its file does not say its prompt; give it: --prompt "..."')
    if prompt is None:
        say(f'{path}: made by {found.program or "a program"} with the prompt "{shorten(words)}"')
    elif found.prompt and found.prompt.strip() != prompt.strip():
        say(
            f'{path}: its file says another prompt, "{shorten(found.prompt)}"; the given one is used'
        )
    if found.loras:
        say(
            f"{path}: made with LoRA files ({', '.join(found.loras)}); --model must have them "
            f"merged in"
        )
    return Question(
        path,
        words,
        seed if seed is not None else found.seed,
        found.steps,
        found.guidance,
        box=box,
    )


def pick_name(question: Question, root: Path, entries: list[dict]) -> str:
    """A path below the root for a question's picture: its own name, or with a hash where another
    picture, or the same one with another prompt, has that, and where only a box of it counts."""
    name = UNSAFE.sub("_", question.picture.name).lstrip(".") or "picture"
    first = Path(file_name(name))
    taken = {Path(entry["synth_image_path"]).with_suffix("").as_posix() for entry in entries}
    plain = f"synth/{first.name}"
    target = root / plain
    is_other = target.exists() and hash_file(target) != hash_file(question.picture)
    if question.box or Path(plain).with_suffix("").as_posix() in taken or is_other:
        return f"synth/{first.stem[:150]}-{question.key[:8]}{first.suffix}"
    return plain


def place_picture(question: Question, target: Path) -> None:
    """Copies a picture into the data root, whole or not at all."""
    if target.exists() and hash_file(target) == hash_file(question.picture):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    # It clears away the part that a killed process left, too.
    with open(question.picture, "rb") as read, whole_file(target) as written:
        shutil.copyfileobj(read, written, 1 << 20)


def make_entry(question: Question, root: Path, entries: list[dict]) -> dict:
    """The task of a question, whose picture is put into the data root."""
    if question.latents and not question.box:
        name = question.picture.relative_to(root).as_posix()
    else:
        name = pick_name(question, root, entries)
        place_picture(question, root / name)
    more = {
        "seed": question.seed,
        "num_inference_steps": question.steps,
        "guidance_scale": question.guidance,
        "latents": question.latents,
        "embeddings": question.embeddings,
        "row": 0 if question.latents else None,
        "_box": list(question.box) if question.box else None,
        KEY: question.key,
    }
    return {
        "synth_image_path": name,
        "prompt": question.prompt,
        "category": None,
        **{key: value for key, value in more.items() if value is not None},
    }


def read_entries(path: Path) -> dict[str, dict]:
    """The tasks of a file by the keys of their questions, {} where it is not there yet. Raises
    UserError where it is no task file of this program's."""
    if not path.exists():
        return {}
    entries = read_list(path, "task file")
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict) or not isinstance(entry.get("synth_image_path"), str):
            raise UserError(
                f"task file {path}, task {number}: has no synth_image_path; remove the file, or "
                f"give another --out"
            )
    return {str(entry.get(KEY, number)): entry for number, entry in enumerate(entries)}


def find_known(path: Path, question: Question) -> dict | None:
    """The task of a question in a task file, None where it was not asked yet."""
    return read_entries(path).get(question.key)


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Holds a lock beside a file, which the end of the process gives back; of several processes the
    others wait. Where the file system has no locks there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(f".{path.stem}.lock")
    with open(lock, "ab", opener=lambda name, mode: open_plain(name, mode)) as file:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def write_tasks(path: Path, root: Path, questions: Sequence[Question]) -> list[Task]:
    """Adds questions to a task file, each once, and their pictures to the data root; of several
    processes one at a time. Returns their tasks."""
    with alone(path):
        before = read_entries(path)
        entries = dict(before)
        for question in questions:
            there = entries.get(question.key)
            if there and not question.latents:
                place_picture(question, root / there["synth_image_path"])
            else:
                others = [entry for key, entry in entries.items() if key != question.key]
                entries[question.key] = make_entry(question, root, others)
        if entries != before:
            write_json(path, list(entries.values()))
        tasks = {task.synth_image_path: task for task in load_tasks(path, str(root))}
    return [tasks[entries[question.key]["synth_image_path"]] for question in questions]
