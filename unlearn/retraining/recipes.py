"""How a model is trained from scratch, and the weights that it starts with."""

import inspect
from dataclasses import asdict, dataclass
from functools import cache

import torch
from diffusers import UNet2DConditionModel

from .. import noise
from ..datasets.training_sets import TrainingSet
from ..models.pipelines import Model
from ..storage.hashes import digest, hash_tensors

WARMUP_STEPS = 100
SCHEDULES = {  # name -> factor of the learning rate at a step of so many
    "constant": lambda step, num_steps: 1.0,
    "linear": lambda step, num_steps: 1 - step / num_steps,
}
BETAS, WEIGHT_DECAY = (0.9, 0.999), 0.01
Weights = dict[str, torch.Tensor]  # by name


@dataclass(frozen=True)
class Recipe:
    """How a model is trained: what must be the same for two models to be compared. Source: [AbU]
    appendix B."""

    epochs: int
    rate: float
    batch_size: int
    schedule: str
    seed: int
    mixed_precision: str  # no or bf16

    def num_steps(self, num_images: int) -> int:
        """Steps of a whole training."""
        return self.epochs * self.steps_an_epoch(num_images)

    def steps_an_epoch(self, num_images: int) -> int:
        """Steps of one pass over the images, the last with fewer of them where they do not fit."""
        return -(-num_images // self.batch_size)

    def rate_at(self, step: int, num_steps: int) -> float:
        """Learning rate of a step of so many."""
        warmup = min(1, (step + 1) / WARMUP_STEPS)
        return self.rate * warmup * SCHEDULES[self.schedule](step, num_steps)

    def identity(self, model: Model, training_set: TrainingSet) -> dict:
        """Identity of models trained so, but for the images left out."""
        return {
            **asdict(self),
            "prediction_type": model.prediction_type,
            "noise_schedule": model.identity["schedule"],
            "unet": digest(own_configuration(model.denoiser)),
            "initial_weights": hash_initial_weights(model.denoiser, self.seed),
            "optimizer": f"AdamW {BETAS} {WEIGHT_DECAY}",
            "warmup": WARMUP_STEPS,
            "training_set": training_set.identity,
            **noise.identity(),
        }


def own_configuration(denoiser: UNet2DConditionModel) -> dict:
    """What of a denoiser's configuration is not its class's default: a new version's new defaults
    are no other network."""
    defaults = inspect.signature(type(denoiser).__init__).parameters
    return {
        key: value
        for key, value in denoiser.config.items()
        if key in defaults and value != defaults[key].default
    }


def initial_weights(denoiser: UNet2DConditionModel, seed: int) -> Weights:
    """Weights {name: tensor} of an untrained denoiser of this configuration, drawn on the CPU."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UNet2DConditionModel.from_config(denoiser.config).state_dict()


@cache  # every model of a seed starts with the same ones
def hash_initial_weights(denoiser: UNet2DConditionModel, seed: int) -> str:
    """Hash of `initial_weights`."""
    return hash_tensors(initial_weights(denoiser, seed))
