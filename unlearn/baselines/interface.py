"""The one interface of the baselines: a method is a small frozen dataclass that scores a Run."""

from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from ..attribution.curvature import DiagonalFisher
from ..datasets.tasks import Task
from ..datasets.training_sets import TrainingSet
from ..models.pipelines import Model


@dataclass(frozen=True)
class Run:
    """What a method scores from, and what changes memory and speed only."""

    model: Model
    training_set: TrainingSet
    tasks: list[Task]
    queries: list[TrainingSet]  # of one image and one view, in the order of the tasks
    dataroot: str
    resolution: int
    grid: list[int]  # of timesteps
    folder: Path  # RESULT_DIR/baselines
    fisher: DiagonalFisher | None = None
    readings: dict = field(default_factory=dict)  # of pictures that are not read plainly, by id
    batch_size: int = 200  # noisy samples in one pass; memory only
    vae_batch_size: int = 20  # pictures encoded at once; memory only
    overwrite: bool = False  # of gradients that were cached with other settings

    @property
    def needed_fisher(self) -> DiagonalFisher:
        """The Fisher, of a method that needs one. Raises ValueError where there is none."""
        if self.fisher is None:
            raise ValueError("this run has no Fisher")
        return self.fisher

    def exemplars(self, task: Task) -> TrainingSet:
        """A task's exemplars, none where the base model made its query, as a TrainingSet with empty
        latents and embeddings; their captions are the prompt that they were trained with."""
        ids, count = task.exemplar_ids(self.dataroot), len(task.exemplar_paths)
        return TrainingSet(
            self.training_set.name,
            ids,
            [task.train_prompt or ""] * count,
            [Path(self.dataroot) / id for id in ids],
            np.empty((2, count, 0, 0, 0), np.float32),
            np.empty((count, 1, 0, 0), np.float32),
        )


@dataclass(frozen=True)
class Method:
    """A way to score the training images of queries: subclasses are frozen dataclasses, whose
    fields are the flags that change their scores, and so the `settings` of their records."""

    # What it looks at, which is checked before it starts and stands in its records.
    needs_pictures = False  # of the training images
    needs_captions = False
    needs_fisher = False
    needs_base_model = False  # scores only queries that the base model made

    def scores(self, run: Run) -> list[np.ndarray]:
        """Scores of all queries: a list with one array a query, [exemplars + N] float: its
        exemplars, where its model was customized, then the training set. Higher is more
        influential."""
        raise NotImplementedError

    @property
    def settings(self) -> dict:
        """What stands as `settings` in the record of a query's scores."""
        return asdict(self)

    def own_identity(self, run: Run) -> dict:
        """What else the scores of all queries depend on, for their records."""
        return {}

    def query_identity(self, run: Run, task: Task) -> dict:
        """What else the scores of one query depend on, for its record."""
        return {}
