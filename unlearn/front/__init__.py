"""The front door: pictures, a model and a folder of training images in, a page out.

Under OUT stand an ordinary data root (`root/`: links to the pictures, captions, latents, the
Fisher), a task file (`tasks.json`) and results (`results/`), so that every other command works on
them, and a second picture costs its own part only.
"""

import math
import shlex
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from .. import noise
from ..attribution.caches import cache_losses
from ..attribution.curvature import DiagonalFisher
from ..attribution.draws import ImageNoise
from ..attribution.estimation import FisherSettings, choose_num_samples, estimate_fisher
from ..attribution.fishers import open_fisher, own_selection
from ..attribution.names import FRONT_SCORINGS, REMOVAL
from ..attribution.removal import own_settings
from ..attribution.removal_index import row_type
from ..attribution.settings import LossSettings, UnlearnSettings
from ..attribution.studies import Study
from ..baselines.interface import Run
from ..baselines.methods import METHODS
from ..baselines.saving import score_tasks
from ..datasets.boxes import check_box
from ..datasets.entries import Found
from ..datasets.folders import read_folder
from ..datasets.preparation import prepare_training_set
from ..datasets.queries import encode_query
from ..datasets.roots import make_data_root
from ..datasets.settings import PUBLISHED, read_settings
from ..datasets.tasks import Task
from ..datasets.training_sets import TrainingSet
from ..errors import UserError
from ..models.customization import check_texts, check_words
from ..models.lora_files import LoraFile
from ..models.pipelines import Model, load_model, select_parameters
from ..models.sampling import GUIDANCE, NUM_INFERENCE_STEPS
from ..report.page import index_entry, write_index
from ..running import Output, attribute_queries, group_size
from ..runtime.programs import choose_device, say, set_precision
from ..storage.artifacts import check_writable
from ..storage.hashes import hash_file
from . import costs
from .answers import Attribution, read_attribution
from .cautions import find_cautions
from .loras import choose_side, compare_loras, fill_caption, open_loras
from .making import make_picture
from .models import Source, find_model, list_loras
from .planning import count_work, list_done
from .questions import (
    Question,
    ask,
    check_given,
    check_inside,
    write_tasks,
)
from .removing import check_scoring, open_removal, remove_each

__all__ = ["Attribution", "Question", "attribute"]
FEWEST_IMAGES = 2
DATASET = "own"  # with an image's place it keys its noise
SELF = "give another --out"


@dataclass(frozen=True)
class Making:
    """A picture that is to be made."""

    prompt: str
    seed: int
    steps: int
    guidance: float


def check_images(found: Found) -> None:
    """Raises UserError where there is nothing to rank."""
    if len(found.entries) < FEWEST_IMAGES:
        raise UserError(
            f"{found.folder}: only {len(found.entries)} training image, which leaves nothing to "
            f"rank; give the folder of all images that the model was trained on"
        )


def make_fisher(model: Model, images: TrainingSet, root: Path, damping: float) -> DiagonalFisher:
    """The Fisher of a data root, estimated at first use."""
    path, selection = root / "sd_fisher.safetensors", own_selection(model)
    parameters = select_parameters(model.denoiser, selection)
    settings = FisherSettings(choose_num_samples(root, len(images)), selection)
    # Another model's, or of other images: its place is this run's own.
    estimate_fisher(model, images, settings, path, overwrite=True)
    return open_fisher(path, model, parameters, damping, SELF)


def make_losses(study: Study, model: Model, images: TrainingSet, results: Path) -> None:
    """Gives a study the losses before unlearning, made at first use."""
    path, identity = results / "orig_loss/base/laion_loss.npy", study.losses.identity(model, images)
    study.before["laion"] = cache_losses(study.sweep(images), model, path, identity, True)
    study.before_hashes["laion"] = hash_file(path)


def open_study(model: Model, images: TrainingSet, fisher: DiagonalFisher, root: Path) -> Study:
    """What ranks the images, without the losses before unlearning."""
    settings = read_settings(root)
    grid = noise.timestep_grid(settings["time_samples"], model.num_train_timesteps)
    unlearning = UnlearnSettings(
        own_selection(model), damping=settings["damping"], num_train=len(images)
    )
    return Study(
        model,
        {"laion": images},
        fisher,
        unlearning,
        LossSettings(grid, ImageNoise()),
        batch_size=settings["batch_size"],
        overwrite=True,
    )


def compare_similarity(
    model: Model,
    images: TrainingSet,
    tasks: list[Task],
    queries: list[TrainingSet],
    root: Path,
    results: Path,
) -> None:
    """Has the ranks by similarity, which never looks at the model, beside the results."""
    settings = read_settings(root)
    run = Run(
        model,
        images,
        tasks,
        queries,
        str(root),
        model.resolution(settings),
        noise.timestep_grid(settings["time_samples"], model.num_train_timesteps),
        results / "baselines",
        overwrite=True,
    )
    score_tasks(run, "similarity", METHODS["similarity"](), top_k=10, is_shown=False)


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
    command: str = "",
    lora: str | Path | Sequence[str | Path] = (),
    on_step: Callable[[str], None] = say,
) -> list[Attribution]:
    """Which of a model's training images made some pictures: an Attribution of each.

    pictures: files from anywhere, or none: then `prompt` and `seed`, and `steps` and `guidance`,
    say which picture the model is to make; model: what made them, a diffusers folder, a name on the
    hub, a checkpoint file, a data root, whose dataset.json says its model, or the folder of a UNet or
    of a customized model, whose other parts are those of `base`; images: the folder that it was trained on, with captions by any convention (see
    `datasets.folders.read_folder` for caption, captions and groups); prompt, seed: of all
    pictures, by default what each file says. Everything is kept below `out`: called again it goes
    on, and further pictures cost their own part only. dry_run: prints what it would cost, writes
    nothing and returns []. scoring: removal, how much less certain the model would be of the picture
    without an image, or exact, how much worse it explains an image once it has unlearned the
    picture, as published; use_repeats: of removal, an image counts as often as kohya's names of
    folders say that training saw it; box: of removal, (x0, y0, x1, y1): only what the pictures show
    between these pixels counts. command: that repeats it, for the page. lora: LoRA files or
    folders that change the model, FILE_OR_FOLDER[:WEIGHT], whose own matrices are then looked at.
    on_step: is told each step and the time that is left, by default the log; print shows them.
    Raises UserError where something is missing or does not fit.
    """
    check_scoring(scoring, use_repeats, box)
    several = [pictures] if isinstance(pictures, (str, Path)) else list(pictures)
    out = Path(out)
    making = check_making(several, prompt, seed, steps, guidance)
    given = [lora] if isinstance(lora, (str, Path)) else list(lora)
    loras = open_loras(given or list_loras(model))
    if caption is None:
        caption = fill_caption(loras)
    inside = check_box(box) if box else None
    questions = [ask(picture, prompt, seed, inside) for picture in several]
    with TemporaryDirectory() as scratch:  # a dry run leaves nothing
        place = Path(scratch) if dry_run else out
        found = read_folder(images, caption, captions, groups, place / "pictures")
        for line in found.describe():
            say(line)
        check_images(found)
        check_writable(out, SELF)
        set_precision("fp32")
        on_step("loading the model")
        source, loaded = load_source(model, base, place / "model", device, loras)
        check_prompts(loaded, questions)
        side = choose_side(loaded, loras) or source.side
        side = 0 if side == loaded.own_resolution else side
        plan, num_bytes = plan_run(found, loaded, out, questions, making, scoring, side)
        if dry_run:
            costs.show_plan(plan, num_bytes)
            return []
    check_space(out, num_bytes)
    settings = {"name": DATASET, "pipeline": source.pipeline}
    settings |= {"unet": source.unet} if source.unet else {}
    settings |= {"lora": list(source.lora)} if source.lora else {}
    settings |= {"resolution": side} if side else {}
    notes = compare_loras(loras, found, side)
    run = partial(answer, found, loaded, source, settings, out, questions, making, scoring)
    run = partial(run, use_repeats, box, notes)
    return run(costs.Clock(plan, on_step), top_k, command)


def load_source(
    model: str | Path,
    base: str | Path | None,
    place: Path,
    device: str | None,
    loras: Sequence[LoraFile] = (),
) -> tuple[Source, Model]:
    """A model found and loaded. Raises UserError, naming --model, where that cannot be done."""
    lora = tuple(str(each.named) for each in loras)
    source = replace(find_model(model, base, place), lora=lora)
    try:
        loaded = load_model(source.pipeline, choose_device(device), source.unet or None, lora=lora)
    except UserError as error:
        raise UserError(str(error).replace("--sd_version", "--model")) from None
    return source, loaded


def check_prompts(model: Model, questions: list[Question]) -> None:
    """Raises UserError where a prompt has a new word that the model does not know."""
    prompts = {str(question.picture): question.prompt for question in questions}
    try:
        check_words(None, {}, model.reader[0], prompts)
    except UserError as error:
        problem, _, tail = str(error).partition("; give the task")
        way = "; give the model that was customized with it: --model FOLDER --base MODEL"
        raise UserError(problem + way if tail else str(error)) from None
    check_texts(model.reader[0], prompts)


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
    counts = count_work(found, model, out, questions, sampling, removal)
    pace = costs.measure_pace(model, resolution, PUBLISHED["batch_size"])
    steps = costs.list_steps(counts, pace, list_done(out, model, counts.images))
    row_bytes = row_type(removal.sketch_size).itemsize if removal else 0
    return steps, costs.count_bytes(counts, model, resolution, own_selection(model), row_bytes)


def tell_other_model(out: Path, source: Source) -> None:
    """Says where OUT holds answers of another model, which those of this one replace."""
    path = out / "root/dataset.json"
    before = read_settings(out / "root") if path.is_file() else {}
    own = source.pipeline, source.unet, list(source.lora)
    if before and (before["pipeline"], before["unet"], before["lora"]) != own:
        name = " with ".join([before["unet"] or before["pipeline"], *before["lora"]])
        say(
            f"{out}: was made with another model, {name}; what is "
            f"asked of this one is made anew, other answers stay. Another --out keeps both"
        )


def answer(
    found: Found,
    model: Model,
    source: Source,
    settings: dict,
    out: Path,
    questions: list[Question],
    making: Making | None,
    scoring: str,
    use_repeats: bool,
    box: Sequence[int] | None,
    lora_notes: list[str],
    clock: costs.Clock,
    top_k: int,
    command: str,
) -> list[Attribution]:
    """The part of `attribute` that computes and writes. settings: of the data root; lora_notes: what
    the page says of LoRA."""
    tell_other_model(out, source)
    made = make_data_root(found, out / "root", settings)
    say(made.describe())
    root, results = made.root, out / "results"
    if making:
        resolution = model.resolution(read_settings(root))
        sampling = (making.prompt, making.seed, making.steps, making.guidance)
        inside = check_box(box) if box else None
        if inside:
            check_inside(inside, (resolution, resolution), "the picture that is to be made")
        with clock.step(costs.MAKING):
            made_here = make_picture(model, root, DATASET, resolution, *sampling)
        questions = [replace(made_here, box=inside)]
    tasks = write_tasks(out / "tasks.json", root, questions)
    with clock.step(costs.ENCODING):
        encode = f"python -m unlearn encode --dataroot {shlex.quote(str(root))}"
        images = prepare_training_set(model, root, command=encode)
        queries = [encode_query(model, task, str(root)) for task in tasks]
    cautions, of_folder = find_cautions(found, images, tasks, questions, queries, root)
    for question, task in zip(questions, tasks):
        for caution in cautions[task.synth_image_path]:
            say(f"{question.picture}: {caution}")
    remarks = [*of_folder, *lora_notes]
    output = Output(
        results / "influence",
        str(root),
        top_k,
        command,
        "",
        is_shown=False,
        cautions=cautions,
        remarks=remarks,
    )
    different = list(dict.fromkeys(tasks))
    if scoring == REMOVAL:
        study = open_removal(model, images, root, results, use_repeats, box)
        remove_each(study, different, output, clock)
    else:
        unlearn_each(model, images, root, results, different, output, clock)
    with clock.step(costs.COMPARING):
        compare_similarity(model, images, tasks, queries, root, results)
        answers = [
            read_attribution(*pair, root, results, remarks) for pair in zip(questions, tasks)
        ]
    if len(answers) > 1:
        entries = [index_entry(link_to(each, results), each.report) for each in answers]
        index = write_index(results, entries)
        answers = [replace(each, index=index) for each in answers]
    return answers


def unlearn_each(
    model: Model,
    images: TrainingSet,
    root: Path,
    results: Path,
    tasks: list[Task],
    output: Output,
    clock: costs.Clock,
) -> None:
    """Ranks the images for each picture by unlearning it."""
    with clock.step(costs.CURVATURE):
        fisher = make_fisher(model, images, root, read_settings(root)["damping"])
    study = open_study(model, images, fisher, root)
    with clock.step(costs.LOSSES):
        make_losses(study, model, images, results)
    size = group_size(study)
    with clock.step(costs.SCORING):
        for start in range(0, len(tasks), size):
            attribute_queries(study, tasks[start : start + size], output)


def link_to(answer: Attribution, results: Path) -> str:
    """Where a page stands, from the index's place."""
    return (answer.folder / "report.html").relative_to(results).as_posix()
