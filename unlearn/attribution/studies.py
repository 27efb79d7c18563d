"""A study: one model, its candidates, and all that it takes to rank them for its queries."""

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch

from ..datasets.training_sets import TrainingSet
from ..models.pipelines import Model, select_parameters
from .curvature import DiagonalFisher
from .index import Index
from .settings import LossSettings, ScoreSettings, UnlearnSettings
from .sweeps import Sweep


@dataclass
class Study:
    """What the core is given. Queries come one by one, as training sets of one image."""

    model: Model  # customized, where the queries' own is
    image_sets: dict[str, TrainingSet]  # candidates: exemplar, where there are any, then laion
    fisher: DiagonalFisher
    unlearning: UnlearnSettings
    losses: LossSettings
    scoring: ScoreSettings = field(default_factory=ScoreSettings)
    # Of exact scoring, by image set: losses before unlearning, [2n] float32, and their files' hashes.
    before: dict[str, np.ndarray] = field(default_factory=dict, repr=False)
    before_hashes: dict[str, str] = field(default_factory=dict)
    index: Index | None = None  # of the training set: what ranks it before some of it is scored
    batch_size: int = 200  # noisy samples in a pass of scoring or unlearning; memory only
    overwrite: bool = False

    @cached_property
    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """The weights that are unlearned."""
        return select_parameters(self.model.denoiser, self.unlearning.weight_selection)

    def sweep(self, images: TrainingSet) -> Sweep:
        """The sweep that measures the losses of some images."""
        return Sweep(images, self.losses.timesteps, self.batch_size, self.losses.noise)
