"""The front door: pictures, a model and a folder of training images in, a page out.

Under OUT stand an ordinary data root (`root/`: links to the pictures, captions, latents, the
Fisher), a task file (`tasks.json`) and results (`results/`), so that every other command works on
them, and a second picture costs its own part only.
"""

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from . import noise
from .attribution.caches import cache_losses
from .attribution.curvature import DiagonalFisher
from .attribution.draws import ImageNoise
from .attribution.estimation import FisherSettings, choose_num_samples, estimate_fisher
from .attribution.fishers import KV, open_fisher
from .attribution.settings import LossSettings, UnlearnSettings
from .attribution.studies import Study
from .baselines.interface import Run
from .baselines.methods import METHODS
from .baselines.saving import score_tasks
from .datasets.entries import Found
from .datasets.folders import read_folder
from .datasets.metadata import read_generation
from .datasets.pictures import read_picture
from .datasets.preparation import prepare_training_set
from .datasets.queries import encode_query
from .datasets.roots import make_data_root
from .datasets.settings import read_settings
from .datasets.tasks import Task, find_result, load_tasks
from .datasets.training_sets import TrainingSet
from .errors import UserError
from .evaluation.stored_results import read_report
from .models.customization import check_customization, check_tokens
from .models.pipelines import Model, load_model, select_parameters
from .report.contents import Report
from .report.page import index_entry, write_index, write_report
from .report.ranking import Ranking
from .report.standing_out import describe_standing_out, find_standing_out
from .running import Output, attribute_queries, group_size
from .runtime.printing import shorten
from .runtime.programs import choose_device, say, set_precision
from .storage.artifacts import check_writable, own_part, write_json
from .storage.hashes import hash_file
from .storage.reading import read_json

FEWEST_IMAGES = 2
DATASET = "own"  # with an image's place it keys its noise


@dataclass(frozen=True)
class Question:
    """A picture and how it was made."""

    picture: Path
    prompt: str
    seed: int | None = None
    steps: int | None = None
    guidance: float | None = None


@dataclass
class Attribution:
    """What `attribute` found of one picture."""

    question: Question
    ranking: Ranking
    report: Report = field(repr=False)
    folder: Path  # of influence.npz, .csv, the picture and report.html

    @property
    def scores(self) -> np.ndarray:
        """Scores of the training images [n], in the order of `ranking.ids`."""
        return self.ranking.scores

    @property
    def warnings(self) -> list[str]:
        """Why the scores may mean little."""
        return self.ranking.warnings

    @property
    def summary(self) -> str:
        """Which images stand out, how clearly, or that none does, in plain words."""
        return " ".join(describe_standing_out(find_standing_out(self.scores), len(self.scores)))

    def table(self, count: int | None = None) -> list[list]:
        """Rows of the first `count` images, or all: rank, id, caption, score, exemplar, path."""
        return self.ranking.rows(count)

    def show(self, count: int = 10) -> None:
        """Prints the first images and the summary."""
        self.ranking.show(count, f'{self.question.picture.name}: "{self.question.prompt}"')
        say(self.summary)

    def save(self, folder: str | Path) -> Path:
        """Copies the page, the table and the picture into another folder. Returns it."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        for name in ("report.html", "influence.csv", "visualization.jpg"):
            shutil.copyfile(self.folder / name, target / name)
        return target


def ask(
    picture: str | Path, prompt: str | None, seed: int | None = None, guess: bool = True
) -> Question:
    """The question that a picture is, with what its file says of how it was made; what is given
    counts first. Raises UserError where it cannot be read, or has no prompt."""
    path = Path(picture)
    read_picture(path)
    found = read_generation(path)
    if found.prompt and prompt is None:
        say(f'{path}: made by {found.program or "a program"} with the prompt "{found.prompt}"')
    words = prompt if prompt is not None else found.prompt
    if not words:
        raise UserError(f'{path}: its file does not say its prompt; give it: --prompt "..."')
    if prompt is not None and found.prompt and found.prompt.strip() != prompt.strip():
        say(
            f'{path}: its file says another prompt, "{shorten(found.prompt)}"; the given one is used'
        )
    return Question(
        path, words, seed if seed is not None else found.seed, found.steps, found.guidance
    )


def link_picture(question: Question, root: Path) -> str:
    """Puts a picture into a data root, under its own name; another one's of that name keeps its
    place, and this one's has a hash beside it. Returns its path below the root."""
    source = question.picture
    name, content = source.name, hash_file(source)
    target = root / "synth" / name
    if target.exists() and hash_file(target) != content:
        target = target.with_name(f"{source.stem}-{content[:8]}{source.suffix}")
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        part = own_part(target)
        shutil.copyfile(source, part)
        os.replace(part, target)
    return target.relative_to(root).as_posix()


def write_tasks(path: Path, root: Path, questions: Sequence[Question]) -> list[Task]:
    """Adds questions to a task file, those of the same picture and prompt once. Returns their
    tasks."""
    entries = read_json(path, "task file") if path.exists() else []
    asked = []
    for question in questions:
        entry = {
            "synth_image_path": link_picture(question, root),
            "prompt": question.prompt,
            "category": None,
        }
        if question.seed is not None:
            entry["seed"] = question.seed
        entries = [e for e in entries if e["synth_image_path"] != entry["synth_image_path"]]
        entries.append(entry)
        asked.append(entry["synth_image_path"])
    write_json(path, entries)
    tasks = {task.synth_image_path: task for task in load_tasks(path, str(root))}
    return [tasks[name] for name in asked]


def check_images(found: Found, questions: Sequence[Question]) -> None:
    """Raises UserError where there is nothing to rank; says where a picture is one of the training
    images itself."""
    if len(found.entries) < FEWEST_IMAGES:
        raise UserError(
            f"{found.folder}: only {len(found.entries)} training image, which leaves nothing to "
            f"rank; give the folder of all images that the model was trained on"
        )
    contents = {}
    for entry in found.entries:
        contents.setdefault(os.path.getsize(entry.path), []).append(entry)
    for question in questions:
        size = os.path.getsize(question.picture)
        for entry in contents.get(size, ()):
            if hash_file(entry.path) == hash_file(question.picture):
                say(
                    f"{question.picture}: is a training image itself ({entry.name}): that it is its "
                    f"own most influential image says nothing of the model"
                )


def make_root(found: Found, out: Path, model: str) -> Path:
    """The data root of a folder of training images, whose model is a pipeline's folder or name."""
    made = make_data_root(found, out / "root", {"name": DATASET, "pipeline": model})
    say(made.describe())
    return made.root


def make_fisher(model: Model, images: TrainingSet, root: Path, damping: float) -> DiagonalFisher:
    """The Fisher of a data root, estimated at first use."""
    path, parameters = root / "sd_fisher.safetensors", select_parameters(model.denoiser, KV)
    settings = FisherSettings(choose_num_samples(root, len(images)))
    # Another model's, or of other images: its place is this run's own.
    estimate_fisher(model, images, settings, path, overwrite=True)
    return open_fisher(path, model, parameters, damping, "give another --out")


def open_study(model: Model, images: TrainingSet, root: Path, results: Path) -> Study:
    """All that ranks the images: the Fisher and the losses before unlearning, made at first use."""
    settings = read_settings(root)
    grid = noise.timestep_grid(settings["time_samples"], len(model.alpha_bars))
    unlearning = UnlearnSettings(damping=settings["damping"], num_train=len(images))
    study = Study(
        model,
        {"laion": images},
        make_fisher(model, images, root, settings["damping"]),
        unlearning,
        LossSettings(grid, ImageNoise()),
        batch_size=settings["batch_size"],
        overwrite=True,
    )
    path, identity = results / "orig_loss/base/laion_loss.npy", study.losses.identity(model, images)
    study.before["laion"] = cache_losses(study.sweep(images), model, path, identity, True)
    study.before_hashes["laion"] = hash_file(path)
    return study


def compare_similarity(study: Study, tasks: list[Task], root: Path, results: Path) -> None:
    """Has the ranks by similarity, which never looks at the model, beside the results."""
    images, method = study.image_sets["laion"], METHODS["similarity"]()
    queries = [encode_query(study.model, task, str(root)) for task in tasks]
    run = Run(
        study.model,
        images,
        tasks,
        queries,
        str(root),
        study.model.resolution(read_settings(root)),
        study.losses.timesteps,
        results / "baselines",
        overwrite=True,
    )
    score_tasks(run, "similarity", method, top_k=10, is_shown=False)


def read_attribution(question: Question, task: Task, root: Path, results: Path) -> Attribution:
    """What stands of one picture in the folder of results; its page is written."""
    folder = find_result(results / "influence", task)
    name = folder.relative_to(results / "influence").as_posix()
    report = read_report(results, name, str(root), task)
    write_report(folder, report)
    rows = sorted(report.rows, key=lambda row: row.id)
    scores = np.array([row.score for row in rows])
    ranks = {row.id: rank for rank, row in enumerate(report.rows)}
    order = np.argsort([ranks[row.id] for row in rows])
    ranking = Ranking(
        [row.id for row in rows],
        [row.caption for row in rows],
        [row.path for row in rows],
        scores,
        order,
        np.array([row.is_exemplar for row in rows]),
        list(report.cautions),
    )
    return Attribution(question, ranking, report, folder)


def attribute(
    pictures: str | Path | Sequence[str | Path],
    model: str | Path,
    images: str | Path,
    prompt: str | None = None,
    out: str | Path = "attribution",
    seed: int | None = None,
    caption: str | None = None,
    captions: str | None = None,
    groups: str | None = None,
    top_k: int = 10,
    device: str | None = None,
    command: str = "",
    on_step: Callable[[str], None] = say,
) -> list[Attribution]:
    """Which of a model's training images made some pictures.

    pictures: files from anywhere; model: the diffusers pipeline that made them, a folder or a name
    on the hub; images: the folder that it was trained on, with captions by any convention (see
    `datasets.folders.read_folder` for caption, captions and groups); prompt, seed: of all pictures,
    by default what each file says. Everything is kept below `out`: called again it goes on, and
    further pictures cost their own part only. command: that repeats it, for the page. Raises
    UserError where something is missing or does not fit.
    """
    several = [pictures] if isinstance(pictures, (str, Path)) else list(pictures)
    out, set_names = Path(out), captions
    questions = [ask(picture, prompt, seed) for picture in several]
    found = read_folder(images, caption, set_names, groups, out / "pictures")
    for line in found.describe():
        say(line)
    check_images(found, questions)
    check_writable(out, "give another --out")
    name = os.path.abspath(model) if Path(model).exists() else str(model)
    set_precision("fp32")
    on_step("loading the model")
    loaded = load_model(name, choose_device(device))
    root, results = make_root(found, out, name), out / "results"
    tasks = write_tasks(out / "tasks.json", root, questions)
    check_customization(loaded, None, tasks)
    check_tokens(None, tasks, name)
    on_step("encoding pictures and captions")
    training_set = prepare_training_set(loaded, root)
    on_step("estimating the curvature and the losses before unlearning")
    study = open_study(loaded, training_set, root, results)
    on_step("unlearning the pictures and scoring every image again")
    output = Output(results / "influence", str(root), top_k, command, "", is_shown=False)
    size = group_size(study)
    for start in range(0, len(tasks), size):
        attribute_queries(study, tasks[start : start + size], output)
    on_step("comparing with similarity")
    compare_similarity(study, tasks, root, results)
    answers = [read_attribution(*pair, root, results) for pair in zip(questions, tasks)]
    if len(answers) > 1:
        write_index(results, [index_entry(link_to(each, results), each.report) for each in answers])
    return answers


def link_to(answer: Attribution, results: Path) -> str:
    """Where a page stands, from the index's place."""
    return (answer.folder / "report.html").relative_to(results).as_posix()
