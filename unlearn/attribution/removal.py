"""Attribution by removal: how much less certain would the query's prediction be without an image?

Near its weights a model is linear, and what its training images fix of them is the Gram matrix of
their features: at a timestep, the derivatives of random signs of the prediction, phi = J^T v, with
noise and signs that are the same for every image and query. What they leave open of a query's own
features is phi_q^T M phi_q, with M = (Phi^T Phi + lambda I)^-1. An image's score is the exact rise
of that when its rows are removed. No loss is in it, and no first order, which is noise where images
lie in minima of their own losses.

One backward pass an image and probe serves every query; gradients of all weights are kept as count
sketches.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from operator import itemgetter

import numpy as np
import torch

from .. import noise
from ..datasets.conditioning import Conditioning, count_texts, map_tensors
from ..datasets.training_sets import TrainingSet
from ..errors import UserError
from ..models.lora import SELECTION, has_matrices
from ..models.pipelines import Model, select_parameters, tracked
from ..runtime.programs import run_within_memory
from .losses import loss_sums
from .sketch import Sketch

EXPLAINED_AT = 0.65  # of all timesteps: where own pictures differ most from strange ones, by loss


@dataclass(frozen=True)
class RemovalSettings:
    """What decides the features: their record's identity holds these fields."""

    weight_selection: str = "all"
    timesteps: tuple[int, ...] = (350,) * 4  # one that is named again is drawn again
    probes: int = 2
    sketch_size: int = 8192
    noise_seed: int = 0

    @property
    def identity(self) -> dict:
        """What features that may be compared have in common."""
        return {**asdict(self), "timesteps": list(self.timesteps)}


USUAL = RemovalSettings()


def own_settings(model: Model) -> RemovalSettings:
    """The settings where nobody says others: derivatives of all weights, of a LoRA's own matrices
    where they stand beside the weights."""
    return replace(USUAL, weight_selection=SELECTION if has_matrices(model.denoiser) else "all")


def feature_identity(model: Model, training_set: TrainingSet, settings: RemovalSettings) -> dict:
    """Identity of the features of a training set."""
    return {
        **model.identity,
        "dataset": training_set.name,
        "num_images": len(training_set),
        "training_set": training_set.identity,
        **noise.identity(),
        **settings.identity,
        "precision": "fp32",
    }


def draw_slots(timesteps: Sequence[int], num_draws: int) -> list[tuple[int, int, int, int]]:
    """Slots (view, caption, timestep, draw) of so many draws at each timestep; where one is named
    again it has draws of its own."""
    seen, slots = Counter(), []
    for timestep in timesteps:
        first = seen[timestep] * num_draws
        slots += [(0, 0, timestep, first + draw) for draw in range(num_draws)]
        seen[timestep] += 1
    return slots


def read_image(
    images: TrainingSet, row: int, device: torch.device
) -> tuple[torch.Tensor, list[Conditioning]]:
    """Latent [C, h, w] of an image as it is and the conditioning {name: [1, ...]} of each of its
    captions, float32. Raises UserError where one is not finite."""
    latent, conditioning = images.image_tensors(0, row, device)
    return latent, [
        map_tensors(itemgetter(slice(number, number + 1)), conditioning)
        for number in range(count_texts(conditioning))
    ]


class FeatureMaker:
    """Makes the features of images under one model: noise, signs and sketch are drawn once."""

    def __init__(self, model: Model, shape: tuple[int, ...], settings: RemovalSettings):
        """shape: (C, h, w) of a latent. Raises UserError where a timestep is none of the
        model's."""
        self.model, self.settings = model, settings
        for timestep in settings.timesteps:
            if not 0 <= timestep < model.num_train_timesteps:
                raise UserError(
                    f"timesteps {timestep}: expected 0 to {model.num_train_timesteps - 1}, the "
                    f"timesteps of the model"
                )
        self.parameters = select_parameters(
            model.denoiser, settings.weight_selection, with_unread=True
        )
        self.sketch = Sketch(
            self.parameters, settings.sketch_size, settings.noise_seed, model.device
        )
        self.normals, normals = (
            torch.from_numpy(
                noise.image_noise(
                    settings.noise_seed,
                    "removal",
                    kind,
                    draw_slots(settings.timesteps, num_draws),
                    shape,
                )
            ).to(model.device)
            for kind, num_draws in (("noise", 1), ("signs", settings.probes))
        )
        signs = torch.where(normals < 0, -1.0, 1.0) / normals[0].numel() ** 0.5
        self.signs = signs.unflatten(0, (len(settings.timesteps), settings.probes))

    def make(
        self, images: TrainingSet, rows: Iterable[int], cells: np.ndarray | None = None
    ) -> np.ndarray:
        """Features [images, timesteps, captions * probes, sketch_size] float32 of some rows of a
        training set, as they are, not mirrored. Each is made alone, so that no batch enters it.
        cells: bool [h, w] of their latents, where only these count: signs elsewhere are 0."""
        with tracked(self.parameters):
            return np.stack([self.image_features(images, row, cells) for row in rows])

    def image_features(
        self, images: TrainingSet, row: int, cells: np.ndarray | None = None
    ) -> np.ndarray:
        """Features of one image. Raises UserError where its latents or conditioning are not
        finite."""
        signs = self.signs
        if cells is not None:
            signs = signs * torch.from_numpy(cells).to(signs)
        latent, captions = read_image(images, row, self.model.device)

        def make(size: int) -> torch.Tensor:
            features = [
                torch.stack(
                    [
                        feature
                        for caption in captions
                        for feature in self.probe(latent, number, caption, signs[number])
                    ]
                )
                for number in range(len(self.settings.timesteps))
            ]
            return torch.stack(features)

        return run_within_memory(make, 1, "samples", self.model.save_memory)[0].cpu().numpy()

    def explain(self, images: TrainingSet, rows: Iterable[int]) -> np.ndarray:
        """How well the model explains some images: losses [images] float32 at one timestep, with
        noise common to all, mean over pixels and captions. A picture of another model has a higher
        one than any image: see `report.results.find_strange`."""
        timestep = int(EXPLAINED_AT * self.model.num_train_timesteps)
        timesteps = torch.tensor([timestep], device=self.model.device)
        shape = tuple(self.normals.shape[1:])
        drawn = noise.image_noise(
            self.settings.noise_seed, "removal", "noise", [(0, 0, timestep, 0)], shape
        )
        normals, losses = torch.from_numpy(drawn).to(self.model.device), []
        for row in rows:
            latent, captions = read_image(images, row, self.model.device)
            sums = [
                loss_sums(self.model, latent[None], normals, timesteps, caption)
                for caption in captions
            ]
            losses.append(float(torch.stack(sums).mean()))
        return np.array(losses, np.float32)

    def probe(
        self, latent: torch.Tensor, number: int, conditioning: Conditioning, signs: torch.Tensor
    ) -> Iterator[torch.Tensor]:
        """The sketches of J^T v at a timestep, for each of some signs v: yields [sketch_size]."""
        timesteps = torch.tensor([self.settings.timesteps[number]], device=latent.device)
        noisy = self.model.diffuse(latent[None], self.normals[number][None], timesteps)
        kept = None
        for direction in signs:
            with torch.enable_grad():
                prediction = (
                    self.model.predict(noisy, timesteps, conditioning)[0].float()
                    if kept is None
                    else kept
                )
            # What checkpointing computes again would be kept with it.
            kept = None if self.model.is_saving_memory else prediction
            yield self.sketch.project(
                differentiate(prediction, self.parameters, direction, kept is not None)
            )


def differentiate(
    prediction: torch.Tensor,
    parameters: Mapping[str, torch.Tensor],
    direction: torch.Tensor,
    is_kept: bool = True,
) -> dict[str, torch.Tensor]:
    """J^T v, {name: tensor}: how a prediction changes in a direction v with each parameter. is_kept:
    whether the prediction can be differentiated again."""
    gradients = torch.autograd.grad(
        prediction,
        list(parameters.values()),
        direction,
        retain_graph=is_kept,
        materialize_grads=True,
    )
    return dict(zip(parameters, gradients))
