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

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np
import torch

from .. import noise
from ..datasets.training_sets import TrainingSet, check_pixels
from ..errors import UserError
from ..models.pipelines import Model, select_parameters, tracked
from .sketch import Sketch

RIDGE = 0.1  # lambda, as a multiple of the mean squared norm of a row


@dataclass(frozen=True)
class RemovalSettings:
    """What decides the features: their record's identity holds these fields."""

    weight_selection: str = "all"
    timesteps: tuple[int, ...] = (350,)
    probes: int = 2
    sketch_size: int = 8192
    noise_seed: int = 0


def feature_identity(model: Model, training_set: TrainingSet, settings: RemovalSettings) -> dict:
    """Identity of the features of a training set."""
    return {
        **model.identity,
        "dataset": training_set.name,
        "num_images": len(training_set),
        "training_set": training_set.identity,
        **noise.identity(),
        **asdict(settings),
        "timesteps": list(settings.timesteps),
        "precision": "fp32",
    }


class FeatureMaker:
    """Makes the features of images under one model: noise, signs and sketch are drawn once."""

    def __init__(self, model: Model, shape: tuple[int, ...], settings: RemovalSettings):
        """shape: (C, h, w) of a latent. Raises UserError where a timestep is none of the
        model's."""
        self.model, self.settings = model, settings
        for timestep in settings.timesteps:
            if not 0 <= timestep < len(model.alpha_bars):
                raise UserError(
                    f"timesteps {timestep}: expected 0 to {len(model.alpha_bars) - 1}, the "
                    f"timesteps of the model"
                )
        self.parameters = select_parameters(model.denoiser, settings.weight_selection)
        self.sketch = Sketch(
            self.parameters, settings.sketch_size, settings.noise_seed, model.device
        )
        self.normals, normals = (
            torch.from_numpy(
                noise.image_noise(
                    settings.noise_seed,
                    "removal",
                    kind,
                    [(0, 0, timestep, draw) for timestep in settings.timesteps for draw in draws],
                    shape,
                )
            ).to(model.device)
            for kind, draws in (("noise", [0]), ("signs", range(settings.probes)))
        )
        signs = torch.where(normals < 0, -1.0, 1.0) / normals[0].numel() ** 0.5
        self.signs = signs.unflatten(0, (len(settings.timesteps), settings.probes))

    def make(self, images: TrainingSet, rows: Iterable[int]) -> np.ndarray:
        """Features [images, timesteps, captions * probes, sketch_size] float32 of some rows of a
        training set, as they are, not mirrored. Each is made alone, so that no batch enters it."""
        with tracked(self.parameters):
            return np.stack([self.image_features(images, row) for row in rows])

    def image_features(self, images: TrainingSet, row: int) -> np.ndarray:
        """Features of one image. Raises UserError where its latents or embeddings are not
        finite."""
        latent, embeddings = (
            torch.from_numpy(np.array(array, np.float32)).to(self.model.device)
            for array in (images.latents[0, row], images.embeddings[row])
        )
        check_pixels(
            f"latents or embeddings of {images.ids[row]}",
            [float(latent.sum()), float(embeddings.sum())],
        )
        features = [
            torch.stack(
                [
                    feature
                    for embedding in embeddings
                    for feature in self.probe(latent, number, embedding)
                ]
            )
            for number in range(len(self.settings.timesteps))
        ]
        return torch.stack(features).cpu().numpy()

    def probe(
        self, latent: torch.Tensor, number: int, embedding: torch.Tensor
    ) -> Iterator[torch.Tensor]:
        """The sketches of J^T v at a timestep, for each of its signs v: yields [sketch_size]."""
        timesteps = torch.tensor([self.settings.timesteps[number]], device=latent.device)
        with torch.enable_grad():
            noisy = self.model.diffuse(latent[None], self.normals[number][None], timesteps)
            prediction = self.model.predict(noisy, timesteps, embedding[None])[0].float()
        for signs in self.signs[number]:
            gradients = torch.autograd.grad(
                prediction,
                list(self.parameters.values()),
                signs,
                retain_graph=True,
                materialize_grads=True,
            )
            yield self.sketch.project(dict(zip(self.parameters, gradients)))


def ridge_inverse(
    blocks: Callable[[], Iterator[np.ndarray]], size: int, ridge: float
) -> Callable[[np.ndarray], np.ndarray]:
    """X -> X (Phi^T Phi + lambda I)^-1 for rows X [n, size] float64; lambda is `ridge` times the
    mean squared norm of the rows of Phi.

    blocks() yields Phi in blocks of images, [images, rows, size]. Where there are fewer rows than columns
    the matrix of their products is inverted instead: (Phi^T Phi + lambda I)^-1 = (I - Phi^T (Phi
    Phi^T + lambda I)^-1 Phi) / lambda. So no more is held than size x size numbers, and a block.
    """
    held, gram, num_rows, squares = [], None, 0, 0.0
    for block in blocks():
        rows = block.reshape(-1, size)
        num_rows, squares = num_rows + len(rows), squares + float(np.square(rows).sum())
        held.append(rows)
        if num_rows >= size:
            gram = np.zeros((size, size)) if gram is None else gram
            for part in held:
                gram += part.T @ part
            held = []
    if not squares > 0:
        raise UserError("the features of all images are 0; the model's prediction is constant")
    damping = ridge * squares / num_rows
    if gram is None:
        rows = np.concatenate(held)
        inverse = np.linalg.inv(rows @ rows.T + damping * np.eye(num_rows))
        return lambda queries: (queries - (queries @ rows.T) @ inverse @ rows) / damping
    gram[np.diag_indices(size)] += damping
    factor = torch.linalg.cholesky(torch.from_numpy(gram))
    return lambda queries: torch.cholesky_solve(torch.from_numpy(queries.T), factor).numpy().T


def removal_rises(
    block: np.ndarray, queries: np.ndarray, inverse: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """The rise of phi_q^T M phi_q when an image's rows are removed, exactly: phi_q^T M Phi_i^T (I -
    Phi_i M Phi_i^T)^-1 Phi_i M phi_q, summed over the query's rows: [queries, images] float64.

    block: [images, rows, size]; queries: [queries, rows, size]; inverse: of `ridge_inverse` of rows
    that hold the block's. Source: Woodbury's identity.
    """
    solved = inverse(block.reshape(-1, block.shape[-1])).reshape(block.shape)
    own = np.eye(block.shape[1]) - solved @ block.swapaxes(1, 2)
    shared = solved[:, None] @ queries.swapaxes(1, 2)  # [images, queries, rows, rows of the query]
    return (shared * np.linalg.solve(own[:, None], shared)).sum(axis=(2, 3)).T


def score_removal(
    blocks: Callable[[], Iterator[np.ndarray]],
    queries: np.ndarray,
    ridge: float = RIDGE,
    repeats: np.ndarray | None = None,
) -> np.ndarray:
    """Scores [queries, N] float64 of every training image, summed over timesteps.

    blocks() yields the features of the training set [images, timesteps, rows, size], in its order;
    queries: theirs, [queries, timesteps, rows, size]; repeats: how often training saw each image,
    [N], where that is known and not alike: an image seen four times counts as four. `blocks` is
    gone through twice a timestep.
    """

    def at(timestep: int) -> Iterator[np.ndarray]:
        start = 0
        for block in blocks():
            own = np.asarray(block[:, timestep], np.float64)
            if repeats is not None:
                own = own * np.sqrt(repeats[start : start + len(own)])[:, None, None]
            start += len(own)
            yield own

    scores = [
        score_timestep(partial(at, timestep), np.asarray(queries[:, timestep], np.float64), ridge)
        for timestep in range(queries.shape[1])
    ]
    return np.sum(scores, axis=0)


def score_timestep(
    blocks: Callable[[], Iterator[np.ndarray]], queries: np.ndarray, ridge: float
) -> np.ndarray:
    """Scores [queries, N] float64 at one timestep: blocks() yields [images, rows, size], queries
    are [queries, rows, size], all float64."""
    inverse = ridge_inverse(blocks, queries.shape[-1], ridge)
    return np.concatenate([removal_rises(block, queries, inverse) for block in blocks()], axis=1)
