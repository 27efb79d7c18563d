"""What the front door computes and writes, once all is found and checked."""

import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from .. import noise
from ..attribution.names import REMOVAL
from ..baselines.interface import Run
from ..baselines.methods import METHODS
from ..baselines.saving import score_tasks
from ..datasets.boxes import Box, check_inside, query_cells
from ..datasets.entries import Found
from ..datasets.preparation import prepare_training_set
from ..datasets.queries import encode_query
from ..datasets.roots import make_data_root
from ..datasets.settings import read_settings
from ..datasets.tasks import Task, find_result
from ..datasets.training_sets import TrainingSet
from ..models.pipelines import Model
from ..report.page import index_entry, write_index
from ..report.ranking import name_images
from ..report.together import Together, describe_same
from ..running import Output, attribute_by_removal
from ..runtime.programs import say
from ..storage.hashes import digest
from ..storage.sharing import occupy, turn
from . import costs
from .answers import Attribution, read_attribution
from .cautions import find_cautions
from .making import make_picture
from .models import Source
from .questions import (
    Question,
    write_tasks,
)
from .removing import open_removal
from .together import find_groups, sum_up
from .unlearning import unlearn_each

DATASET = "own"  # with an image's place it keys its noise


@dataclass(frozen=True)
class Making:
    """A picture that is to be made."""

    prompt: str
    seed: int
    steps: int
    guidance: float


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


@dataclass(frozen=True)
class Job:
    """What a call of `attribute` has found and checked, before anything is written."""

    found: Found
    model: Model
    source: Source
    settings: dict  # of the data root, dataset.json
    out: Path
    scoring: str
    use_repeats: bool
    box: Box | None
    top_k: int
    command: str  # that repeats it
    lora_notes: list[str]  # what the page says of LoRA

    @property
    def root(self) -> Path:
        """The data root that is made."""
        return self.out / "root"

    @property
    def results(self) -> Path:
        """Where features, losses and answers stand."""
        return self.out / "results"

    def output(
        self,
        cautions: dict[str, list[str]],
        remarks: list[str],
        on_saved: Callable[[Task], object],
    ) -> Output:
        """Where answers go, and what they say of themselves."""
        return Output(
            self.results / "influence",
            str(self.root),
            self.top_k,
            self.command,
            "",
            is_shown=False,
            cautions=cautions,
            remarks=remarks,
            on_saved=on_saved,
        )


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


def name_use(job: Job) -> str:
    """What OUT is used for: answers of one model about one folder's images."""
    images = [(str(each.path), each.captions, each.repeats) for each in job.found.entries]
    return digest(job.settings, images)


def answer(
    job: Job, questions: list[Question], making: Making | None, clock: costs.Clock
) -> list[Attribution]:
    """`answer_alone`, with OUT marked as in use for this model and these images. Raises UserError where
    another process is at work there on others."""
    remedy = "give another --out, or wait until it is done"
    with occupy(job.out, name_use(job), remedy):
        return answer_alone(job, questions, making, clock)


def answer_alone(
    job: Job, questions: list[Question], making: Making | None, clock: costs.Clock
) -> list[Attribution]:
    """The part of `attribute` that computes and writes."""
    model, root, results = job.model, job.root, job.results
    tell_other_model(job.out, job.source)
    say(make_data_root(job.found, root, job.settings).describe())
    if making:
        questions = [make_question(job, making, clock)]
    tasks = write_tasks(job.out / "tasks.json", root, questions)
    with clock.step(costs.ENCODING), model.encoding():
        encode = f"python -m unlearn encode --dataroot {shlex.quote(str(root))}"
        images = prepare_training_set(model, root, command=encode)
        queries = [encode_query(model, task, str(root)) for task in tasks]
    for query in queries:
        query_cells(job.box, query, model.pipeline.vae_scale_factor)
    cautions, of_folder = find_cautions(job.found, images, tasks, questions, queries, root)
    for question, task in zip(questions, tasks):
        for caution in cautions[task.synth_image_path]:
            say(f"{question.picture}: {caution}")
    with clock.step(costs.COMPARING):
        compare_similarity(model, images, tasks, queries, root, results)
    remarks, groups, study = [*of_folder, *job.lora_notes], [], None
    if job.scoring == REMOVAL:
        study = open_removal(model, images, root, results, job.use_repeats, job.box)
        with clock.step(costs.FEATURES):
            study.build()
            groups = find_groups(study)
        names = name_images(images.ids, images.paths, np.zeros(len(images), bool))
        remarks += describe_same([[names[row] for row in group] for group in groups])
    asked, answers = dict(zip(tasks, questions)), {}

    def read(task: Task) -> None:
        answers[task] = read_attribution(asked[task], task, root, results, remarks)

    output, different = job.output(cautions, remarks, read), list(asked)
    if study:
        with clock.step(costs.REMOVING):
            attribute_by_removal(study, different, output)
    else:
        unlearn_each(model, images, root, results, different, output, clock, job.scoring, job.box)
    for task in different:
        if task not in answers:  # another process of a launch has written it
            with turn(find_result(output.folder, task) / "influence.npz"):
                read(task)
    found = [replace(answers[task], question=each) for each, task in zip(questions, tasks)]
    together = sum_up(found, study, queries, groups, results) if study else None
    return add_index(found, results, together)


def make_question(job: Job, making: Making, clock: costs.Clock) -> Question:
    """The picture that the model is asked to make, and the question that it is."""
    resolution = job.model.resolution(read_settings(job.root))
    if job.box:
        check_inside(job.box, (resolution, resolution), "the picture that is to be made")
    sampling = (making.prompt, making.seed, making.steps, making.guidance)
    with clock.step(costs.MAKING):
        made = make_picture(job.model, job.root, DATASET, resolution, *sampling)
    return replace(made, box=job.box)


def add_index(
    answers: list[Attribution], results: Path, together: Together | None
) -> list[Attribution]:
    """The answers with the page that leads to each, where there are several, and what they say
    together."""
    if len(answers) < 2:
        return answers
    entries = [index_entry(link_to(each, results), each.report) for each in answers]
    index = write_index(results, entries, together)
    return [replace(each, index=index, together=together) for each in answers]


def link_to(answer: Attribution, results: Path) -> str:
    """Where a page stands, from the index's place."""
    return (answer.folder / "report.html").relative_to(results).as_posix()
