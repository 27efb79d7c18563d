"""Methods that never look at the weights of the model that made the picture: chance, shared words,
centred cosines."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import numpy as np

from .. import noise
from ..runtime.programs import progress
from .interface import Method, Run
from .similarity import (
    Encode,
    cosine_scores,
    encode_blocks,
    latent_blocks,
    latent_encoder,
    mean_features,
    pixel_encoder,
    score_queries,
    text_blocks,
    word_scores,
)


def feature_scores(
    run: Run, encode: Encode, blocks: Callable[[], Iterable[np.ndarray]], name: str
) -> list[np.ndarray]:
    """Centred cosine to the query's picture, of the better of an image's two views. blocks: see
    `score_queries`."""
    with progress(2 * len(run.training_set), name, "images") as bar:
        return list(score_queries(encode, blocks, run.tasks, run.dataroot, bar.update))


def picture_scores(run: Run, encode: Encode, name: str) -> list[np.ndarray]:
    """Cosine of what an encoder makes of the training images' pictures."""
    paths = cast(Sequence[Path], run.training_set.paths)  # all there, as `needs_pictures` says
    return feature_scores(run, encode, lambda: encode_blocks(encode, paths), name)


def compare_queries(
    run: Run, queries: Sequence[np.ndarray], blocks: Callable[[], Iterable[np.ndarray]], name: str
) -> np.ndarray:
    """Centred cosines [queries, N] of the queries' features with the training set's. blocks: see
    `score_queries`."""
    with progress(2 * len(run.training_set), name, "images") as bar:
        mean = mean_features(blocks(), bar.update)
        return cosine_scores(
            np.stack([features.reshape(-1) for features in queries]), blocks(), mean, bar.update
        )


def text_scores(run: Run, name: str) -> np.ndarray:
    """Cosines [queries, N] of the prompt's embedding and the best caption's, last hidden states
    with every token."""
    return compare_queries(
        run,
        [query.embeddings[0, 0] for query in run.queries],
        lambda: text_blocks(run.training_set),
        name,
    )


@dataclass(frozen=True)
class Random(Method):
    """Uniform numbers that belong to the query and the seed."""

    seed: int

    def scores(self, run: Run) -> list[np.ndarray]:
        return [
            noise.image_generator(
                self.seed, query.name, f"random order, {query.ids[0]}"
            ).random_raw(len(task.exemplar_paths) + len(run.training_set))
            / 2.0**64
            for task, query in zip(run.tasks, run.queries)
        ]


@dataclass(frozen=True)
class Words(Method):
    """How many different words prompt and caption share, over how many they have in all (Jaccard's
    index): |P & C| / |P | C|, where P and C are the sets of their words in lower case; 0 where
    neither has one. A word is a run of letters, digits and underscores. An image counts by its
    first caption, an exemplar by the prompt that it was trained with."""

    needs_captions = True

    def scores(self, run: Run) -> list[np.ndarray]:
        training = word_scores([task.prompt for task in run.tasks], run.training_set.captions)
        return [
            np.concatenate(
                [*word_scores([task.prompt], run.exemplars(task).captions), training_scores]
            )
            for task, training_scores in zip(run.tasks, training)
        ]


@dataclass(frozen=True)
class Cosines(Method):
    """What the records of all methods of cosines say."""

    cosines: str = field(default="centred on the training set's mean", init=False)


@dataclass(frozen=True)
class Pixel(Cosines):
    """Cosine of pixels."""

    needs_pictures = True

    def scores(self, run: Run) -> list[np.ndarray]:
        return picture_scores(run, pixel_encoder(run.resolution), "pixel")


@dataclass(frozen=True)
class Vae(Cosines):
    """Cosine of VAE latents."""

    def scores(self, run: Run) -> list[np.ndarray]:
        return feature_scores(
            run,
            latent_encoder(run.model, run.resolution, run.vae_batch_size),
            lambda: latent_blocks(run.training_set),
            "vae",
        )


@dataclass(frozen=True)
class Text(Cosines):
    """Cosine of the prompt's embedding and the best caption's."""

    needs_base_model = True

    def scores(self, run: Run) -> list[np.ndarray]:
        return list(text_scores(run, "text"))


@dataclass(frozen=True)
class Similarity(Cosines):
    """Cosine of prompt and caption times cosine of VAE latents, negative ones taken as 0, squared:
    what can be said without the model that made the picture."""

    needs_base_model = True

    def scores(self, run: Run) -> list[np.ndarray]:
        texts = text_scores(run, "similarity, texts")
        latents = compare_queries(
            run,
            [query.latents[0, 0] for query in run.queries],
            lambda: latent_blocks(run.training_set),
            "similarity, latents",
        )
        return list((np.maximum(texts, 0) * np.maximum(latents, 0)) ** 2)


@dataclass(frozen=True)
class Features(Method):
    """Cosine of the features of a CLIP or DINO model (`--features`)."""

    model: str  # folder or hub name
    encode: Callable  # see `similarity.feature_encoder`

    needs_pictures = True

    @property
    def settings(self) -> dict:
        return Cosines().settings

    def scores(self, run: Run) -> list[np.ndarray]:
        return picture_scores(run, self.encode, Path(self.model).name)

    def own_identity(self, run: Run) -> dict:
        return {"features": self.model}
