"""The front door: pictures, a model and a folder of training images in, a page out.

Under OUT stand an ordinary data root (`root/`: links to the pictures, captions, latents, the
Fisher), a task file (`tasks.json`) and results (`results/`), so that every other command works on
them, and a second picture costs its own part only.
"""

import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from ..attribution.fishers import own_selection
from ..attribution.names import FRONT_SCORINGS, REMOVAL
from ..attribution.removal import own_settings
from ..attribution.removal_index import row_type
from ..attribution.removal_solutions import count_solved
from ..datasets.entries import Found
from ..datasets.settings import PUBLISHED
from ..errors import UserError
from ..models.embeddings import read_embedding
from ..models.pipelines import Model
from ..models.precision import check_scoring as check_differences
from ..models.sampling import GUIDANCE, NUM_INFERENCE_STEPS
from ..runtime.programs import say, set_precision
from ..storage.artifacts import check_writable
from . import costs
from .answers import Attribution
from .embeddings import tell_words
from .images import check_images, read_images
from .jobs import Job, Making, answer
from .loading import check_prompts, describe_root, load_source, tell_needs
from .loras import choose_side, compare_loras, fill_caption, open_loras
from .models import list_loras
from .planning import count_work, list_done
from .questions import (
    Question,
    ask,
    check_given,
)
from .removing import check_scoring
from .unlearning import SELF

__all__ = ["Attribution", "Question", "attribute"]


def check_space(out: Path, num_bytes: int) -> None:
    """Raises UserError where the disk has less room than a run takes."""
    folder = out.absolute()
    while not folder.is_dir():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise UserError(
            f"{out}: the run takes about {num_bytes / 1e6:,.0f} MB, and its disk has "
            f"{free / 1e6:,.0f} MB left; free some space, or give --out on another disk"
        )


def check_making(
    pictures: Sequence,
    prompt: str | None,
    seed: int | None,
    steps: int | None,
    guidance: float | None,
) -> Making | None:
    """The picture that is to be made, None where pictures are given. Raises UserError where what is
    given does not go together."""
    check_given(prompt, seed)
    if pictures:
        for flag, value in ("--steps", steps), ("--guidance", guidance):
            if value is not None:
                raise UserError(
                    f"{flag}: says how a picture is to be made, and one is given "
                    f"({pictures[0]}); leave out one of them"
                )
        return None
    if prompt is None or seed is None:
        raise UserError(
            'no picture: name one, or have it made: --prompt "..." --seed 0 [--steps '
            f"{NUM_INFERENCE_STEPS}] [--guidance {GUIDANCE}]"
        )
    if steps is not None and not 1 <= steps < 1000:
        raise UserError(f"--steps {steps}: expected 1 to fewer than 1000")
    if guidance is not None and not math.isfinite(guidance):
        raise UserError(f"--guidance {guidance}: expected a number")
    return Making(
        prompt,
        seed,
        NUM_INFERENCE_STEPS if steps is None else steps,
        GUIDANCE if guidance is None else float(guidance),
    )


def as_list(paths: str | Path | Sequence[str | Path]) -> list[str | Path]:
    """One path or several, as a list."""
    return [paths] if isinstance(paths, (str, Path)) else list(paths)


def attribute(
    pictures: str | Path | Sequence[str | Path] = (),
    model: str | Path = "",
    images: str | Path = "",
    prompt: str | None = None,
    out: str | Path = "attribution",
    base: str | Path | None = None,
    seed: int | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    caption: str | None = None,
    captions: str | None = None,
    groups: str | None = None,
    top_k: int = 10,
    device: str | None = None,
    dry_run: bool = False,
    scoring: str = FRONT_SCORINGS[0],
    use_repeats: bool = False,
    box: Sequence[int] | None = None,
    class_images: str | Path | None = None,
    class_prompt: str | None = None,
    command: str = "",
    lora: str | Path | Sequence[str | Path] = (),
    weights: str | None = None,
    textual_inversion: str | Path | Sequence[str | Path] = (),
    on_step: Callable[[str], None] = say,
) -> list[Attribution]:
    """Which of a model's training images made some pictures: an Attribution of each.

    pictures: files from anywhere, or none: then `prompt` and `seed`, and `steps` and `guidance`,
    say which picture the model is to make; model: what made them, a diffusers folder, a name on the
    hub, a checkpoint file, a data root, whose dataset.json says its model, or the folder of a UNet or
    of a customized model, whose other parts are those of `base`; images: the folder that it was
    trained on, with captions by any convention (see `datasets.folders.read_folder` for caption,
    captions and groups), and beside it the class images of prior preservation in `class_images`, with
    `class_prompt` for caption; prompt, seed: of all pictures, by default what each file says. Everything is kept below `out`: called again it goes
    on, and further pictures cost their own part only. dry_run: prints what it would cost, writes
    nothing and returns []. scoring: removal, how much less certain the model would be of the picture
    without an image; exact, how much worse it explains an image once it has unlearned the
    picture, as published; or output, how far its predictions of an image then move; use_repeats: of
    removal, an image counts as often as kohya's names of folders say that training saw it; box: (x0, y0, x1, y1): only what the pictures show
    between these pixels counts. command: that repeats it, for the page. lora: LoRA files or
    folders that change the model, FILE_OR_FOLDER[:WEIGHT], whose own matrices are then looked at;
    textual_inversion: embeddings of new words, FILE_OR_FOLDER[:WORD]. weights: fp32 or bf16, in which
    all but what is unlearned is then held; by default bf16 where float32 does not fit on the GPU.
    on_step: is told each step and the time that is left, by default the log; print shows them.
    Raises UserError where something is missing or does not fit.
    """
    inside = check_scoring(scoring, use_repeats, box)
    several = as_list(pictures)
    out = Path(out)
    making = check_making(several, prompt, seed, steps, guidance)
    loras = open_loras(as_list(lora) or list_loras(model))
    embeddings = [read_embedding(str(each)) for each in as_list(textual_inversion)]
    if caption is None:
        caption = fill_caption(loras)
    questions = [ask(picture, prompt, seed, inside) for picture in several]
    with TemporaryDirectory() as scratch:  # a dry run leaves nothing
        place = Path(scratch) if dry_run else out
        found = read_images(images, caption, captions, groups, class_images, class_prompt, place)
        check_images(found)
        check_writable(out, SELF)
        set_precision("fp32")
        on_step("loading the model")
        source, loaded = load_source(
            model, base, place / "model", device, loras, embeddings, weights
        )
        check_differences(scoring, loaded.weights)
        check_prompts(loaded, questions)
        side = choose_side(loaded, loras) or source.side
        side = 0 if side == loaded.own_resolution else side
        plan, num_bytes = plan_run(found, loaded, out, questions, making, scoring, side)
        if dry_run:
            costs.show_plan(plan, num_bytes, tell_needs(loaded, side, scoring))
            return []
    check_space(out, num_bytes)
    job = Job(
        found,
        loaded,
        source,
        describe_root(source, side),
        out,
        scoring,
        use_repeats,
        inside,
        top_k,
        command,
        [*compare_loras(loras, found, side, loaded), *tell_words(embeddings, found, questions)],
    )
    return answer(job, questions, making, costs.Clock(plan, on_step))


def plan_run(
    found: Found,
    model: Model,
    out: Path,
    questions: list[Question],
    making: Making | None,
    scoring: str,
    side: int,
) -> tuple[list[costs.Step], int]:
    """The steps of a run with their cost, and the bytes that it takes. side: pixels of a picture's,
    0 for the model's own."""
    resolution = model.resolution({"resolution": side})
    sampling = making.steps * (1 if making.guidance == 1 else 2) if making else None
    removal = own_settings(model) if scoring == REMOVAL else None
    counts = count_work(found, model, out, questions, sampling, removal, scoring)
    pace = costs.measure_pace(model, resolution, PUBLISHED["batch_size"])
    steps = costs.list_steps(counts, pace, list_done(out, model, counts.images))
    row_bytes = row_type(removal.sketch_size).itemsize if removal else 0
    num_bytes = costs.count_bytes(counts, model, resolution, own_selection(model), row_bytes)
    solved = count_solved(counts.captions * removal.probes, removal) if removal else 0
    return steps, num_bytes + solved
