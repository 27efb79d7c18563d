"""What losses, weight changes and scores depend on: frozen, and the identity in their records.

What costs memory or time alone (batch sizes of passes, devices, processes) is no setting: it stands
in no record and changes no result.
"""

from dataclasses import asdict, dataclass, field

import torch

from ..datasets.boxes import Box
from ..datasets.settings import AUTO, AUTO_CHANGE, OWN_ROOT, PUBLISHED
from ..datasets.training_sets import TrainingSet
from ..errors import UserError
from ..models.pipelines import Model
from .draws import DRAWS, BatchNoise, ImageNoise

AUTOCAST = {"fp32": None, "tf32": None, "bf16": torch.bfloat16}  # dtype of the denoiser's products
SHORTLIST, AUDIT = 400, 100
AUDITED = "groups by estimate, each query its own"  # which images an audit takes: in records


@dataclass(frozen=True)
class LossSettings:
    """How losses are measured. Two of them may be compared where these are the same."""

    timesteps: list[int]  # the grid: see `noise.timestep_grid`
    noise: ImageNoise | BatchNoise = ImageNoise()
    precision: str = "fp32"  # fp32, tf32, or bf16, which a difference of losses does not survive

    def identity(self, model: Model, images: TrainingSet) -> dict:
        """Identity of the losses of a training set under a model."""
        return {
            **model.identity,
            "dataset": images.name,
            "num_images": len(images),
            "training_set": images.identity,
            **self.noise.identity(model.device),
            "timesteps": self.timesteps,
            "precision": self.precision,
        }


@dataclass(frozen=True)
class UnlearnSettings:
    """How a query is unlearned. Source: [AbU] Eq. 5 and section 4; defaults as of one's own data.
    The fields are those of the record and the flags of compute_influence.py."""

    weight_selection: str = "cross-attn-kv"
    damping: float = OWN_ROOT["damping"]  # of the Fisher, a multiple of its mean
    num_train: int | None = None  # N: images that the model was trained on
    unlearn_lr: float | str = AUTO  # alpha, or auto: one step that moves the weights by AUTO_CHANGE
    unlearn_steps: int = OWN_ROOT["unlearn_steps"]
    unlearn_batch_size: int = PUBLISHED["unlearn_batch_size"]  # draws of a step: this number ...
    unlearn_grad_accum_steps: int = PUBLISHED["unlearn_grad_accum_steps"]  # ... times this one
    seed: int = 0
    precision: str = "fp32"
    compat: str | None = None  # abu: the published program's draws
    box: Box | None = None  # what of the queries' pictures is unlearned; None: all

    def __post_init__(self) -> None:
        if self.unlearn_lr == AUTO and self.unlearn_steps != 1:
            raise UserError(
                f"--unlearn_lr {AUTO}: scales one Newton step, found --unlearn_steps "
                f"{self.unlearn_steps}; give --unlearn_steps 1, or a number as --unlearn_lr"
            )

    @property
    def draws_a_step(self) -> int:
        """Noise draws of one Newton step."""
        return self.unlearn_batch_size * self.unlearn_grad_accum_steps

    @property
    def rate(self) -> float | None:
        """alpha / N, None where it is chosen for each query."""
        return None if isinstance(self.unlearn_lr, str) else self.unlearn_lr / self.known_num_train

    @property
    def known_num_train(self) -> int:
        """N. Raises ValueError where it was left out."""
        if self.num_train is None:
            raise ValueError("num_train: the number of training images was not given")
        return self.num_train

    @property
    def identity(self) -> dict:
        """What queries that may be compared have in common."""
        chosen = {"target_change": AUTO_CHANGE} if self.unlearn_lr == AUTO else {}
        draws = {} if self.compat else {"draws": DRAWS[None].scheme}
        fields = {name: value for name, value in asdict(self).items() if name != "box"}
        box = {"box": list(self.box)} if self.box else {}  # records from before know none
        return {**fields, **chosen, **draws, **box}


@dataclass(frozen=True)
class ScoreSettings:
    """How loss changes are found. Every image is scored, or with `shortlist` only the best of an
    index and `audit` others."""

    scoring: str = "exact"
    shortlist: int | None = None
    audit: int | None = None
    audited: str | None = field(default=None)

    @property
    def identity(self) -> dict:
        """What results that may be compared have in common."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @classmethod
    def of_index(cls, scoring: str, shortlist: int | None, audit: int | None) -> "ScoreSettings":
        """Those of a shortlist from an index."""
        return cls(scoring, shortlist or SHORTLIST, AUDIT if audit is None else audit, AUDITED)
