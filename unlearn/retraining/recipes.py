"""How a model is trained from scratch, and the weights that it starts with."""

import inspect
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, cast

import numpy as np
import torch
from diffusers import ModelMixin

from .. import noise
from ..datasets.training_sets import TrainingSet
from ..errors import UserError
from ..models.pipelines import Model
from ..models.unets import load_unet
from ..storage.hashes import digest, hash_tensors
from .lora import first_matrices

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
    # How often an epoch sees each image, as kohya's folders say it; () for once each.
    repeats: tuple[int, ...] = ()
    # Folder of a trained UNet whose weights training starts from; "": random ones, by the seed.
    start: str = ""
    # Of a LoRA, which is trained on the model as it is; 0: all weights are trained.
    lora_rank: int = 0
    lora_alpha: float = 0.0
    lora_targets: str = "attention"  # a key of the family's `lora_targets`

    def num_steps(self, num_images: int) -> int:
        """Steps of a whole training."""
        return self.epochs * self.steps_an_epoch(num_images)

    def steps_an_epoch(self, num_images: int) -> int:
        """Steps of one pass over the images, the last with fewer of them where they do not fit."""
        return -(-len(self.occurrences(num_images)) // self.batch_size)

    def occurrences(self, num_images: int) -> np.ndarray:
        """The images of an epoch, int64 [sum of the repeats], before they are put in order."""
        return np.repeat(np.arange(num_images), self.repeats or 1)

    def rate_at(self, step: int, num_steps: int) -> float:
        """Learning rate of a step of so many."""
        warmup = min(1, (step + 1) / WARMUP_STEPS)
        return self.rate * warmup * SCHEDULES[self.schedule](step, num_steps)

    def first_weights(self, denoiser: Any) -> Weights:
        """The weights that are trained, {name: tensor}, as training starts from them."""
        if self.lora_rank:
            return first_matrices(denoiser, self.lora_rank, self.lora_targets, self.seed)
        return initial_weights(denoiser, self.seed, self.start)

    def hash_first_weights(self, denoiser: Any) -> str:
        """Hash of all weights as training starts, those included that it does not change."""
        if not self.lora_rank:
            return hash_initial_weights(denoiser, self.seed, self.start)
        return digest(hash_base(denoiser), hash_tensors(self.first_weights(denoiser)))

    def identity(self, model: Model, training_set: TrainingSet) -> dict:
        """Identity of models trained so, but for the images left out."""
        recipe = asdict(self)
        del recipe["start"]  # said by the initial weights
        if not self.lora_rank:  # as before there were any
            for name in ("lora_rank", "lora_alpha", "lora_targets"):
                del recipe[name]
        if not recipe["repeats"]:  # as before there were any
            del recipe["repeats"]
        else:
            recipe["repeats"] = digest(list(self.repeats))
        return {
            **recipe,
            "prediction_type": model.prediction_type,
            "noise_schedule": model.identity["schedule"],
            **({"weights_precision": model.weights} if model.weights != "fp32" else {}),
            **told_by_family(model),
            "unet": digest(own_configuration(model.denoiser)),
            "initial_weights": self.hash_first_weights(model.denoiser),
            "optimizer": f"AdamW {BETAS} {WEIGHT_DECAY}",
            "warmup": WARMUP_STEPS,
            "training_set": training_set.identity,
            **noise.identity(),
        }


def told_by_family(model: Model) -> dict:
    """What else a family's losses depend on: density, weight and guidance of flows."""
    told = model.family.identity(model.pipeline)
    return {name: told[name] for name in told.keys() - {"prediction_type", "schedule"}}


def own_configuration(denoiser: Any) -> dict:
    """What of a denoiser's configuration is not its class's default: a new version's new defaults
    are no other network."""
    defaults = inspect.signature(type(denoiser).__init__).parameters
    return {
        key: value
        for key, value in denoiser.config.items()
        if key in defaults and value != defaults[key].default
    }


def initial_weights(denoiser: Any, seed: int, start: str = "") -> Weights:
    """Weights {name: tensor} that training starts from: those in the folder `start`, else those of
    an untrained denoiser of this configuration, drawn on the CPU. Raises UserError where the
    folder's do not fit."""
    if start:
        unet = load_unet(start)["unet"]
        if own_configuration(unet) != own_configuration(denoiser):
            raise UserError(
                f"train_from {start}: its config.json describes another UNet than the one that is "
                f"to be trained; both must be the same"
            )
        return unet.state_dict()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # A pair only where it is asked for the settings that it does not take.
        made = cast(ModelMixin, type(denoiser).from_config(denoiser.config))
    return {name: value.detach() for name, value in made.named_parameters()}


@cache
def hash_base(denoiser: Any) -> str:
    """Hash of the weights that a LoRA stands beside."""
    return hash_tensors(
        {name: value for name, value in denoiser.named_parameters() if ".lora_" not in name}
    )


@cache  # every model of a seed starts with the same ones
def hash_initial_weights(denoiser: Any, seed: int, start: str = "") -> str:
    """Hash of `initial_weights`."""
    return hash_tensors(initial_weights(denoiser, seed, start))
