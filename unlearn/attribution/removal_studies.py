"""A study by removal: one model, its candidates, and all that it takes to rank them for its queries.
No Fisher and no step are needed."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np

from ..datasets.boxes import Box, query_cells
from ..datasets.training_sets import TrainingSet
from ..errors import UserError
from ..models.pipelines import Model
from ..storage.hashes import digest, hash_file
from .names import REMOVAL
from .removal import FeatureMaker, RemovalSettings, feature_identity
from .removal_groups import Groups, check_groups, group_rises
from .removal_index import LISTING, RemovalIndex, build_features
from .removal_scores import (
    RIDGE,
    Blocks,
    Inverse,
    Solution,
    at_timestep,
    invert,
    score_draws,
    solve,
    weigh,
)
from .removal_sets import ChosenSet, choose_sets
from .removal_solutions import keep_solution


@dataclass(frozen=True)
class Scored:
    """What features say of some queries, float64."""

    draws: np.ndarray  # [timesteps, queries, N]: scores of the candidates; the score is their sum
    units: np.ndarray  # [timesteps, queries]: see `score_draws`
    groups: (
        np.ndarray
    )  # [timesteps, queries, groups]: groups of candidates, each removed as a whole
    sets: list[ChosenSet]  # of each query, images chosen together; [] where none are asked for


@dataclass(frozen=True)
class RemovalStudy:
    """What ranks the candidates of one model by removal. Queries come as training sets of one
    image."""

    model: Model  # customized, where the queries' own is
    image_sets: dict[str, TrainingSet]  # candidates: exemplar, where there are any, then laion
    folder: Path  # of the features of each set, which serve every query of the model
    settings: RemovalSettings = RemovalSettings()
    ridge: float = RIDGE  # see `removal_scores.ridge_inverse`
    repeats: tuple[int, ...] = ()  # how often training saw each candidate; () where it is not told
    box: Box | None = None  # what of the queries' pictures counts; None: all
    overwrite: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.ridge < np.inf:
            raise UserError(f"--ridge {self.ridge:g}: expected a positive number")
        if self.repeats and len(self.repeats) != self.num_images:
            raise UserError(
                f"repeats: expected {self.num_images} numbers, one an image, found "
                f"{len(self.repeats)}"
            )
        if self.num_images < self.settings.probes:
            raise UserError(
                f"--probes {self.settings.probes}: more than the {self.num_images} training "
                f"images; give {self.num_images} or fewer"
            )

    @property
    def num_images(self) -> int:
        """N: candidates of all sets."""
        return sum(map(len, self.image_sets.values()))

    @property
    def scoring(self) -> dict:
        """What results that may be compared have in common."""
        repeats = {"repeats": digest(list(self.repeats))} if self.repeats else {}
        box = {"box": list(self.box)} if self.box else {}
        return {"scoring": REMOVAL, **self.settings.identity, "ridge": self.ridge, **repeats, **box}

    def identity(self, query: TrainingSet) -> dict:
        """Identity of a query's scores."""
        return {
            **self.model.identity,
            "query": query.identity,
            "settings": self.scoring,
            "candidates": [images.identity for images in self.image_sets.values()],
        }

    @cached_property
    def maker(self) -> FeatureMaker:
        """What makes features, of candidates and queries."""
        shape = next(iter(self.image_sets.values())).latents.shape[2:]
        return FeatureMaker(self.model, shape, self.settings)

    def build(self) -> None:
        """Makes the features of all candidates, or keeps those that are there; of several processes
        each makes some. Raises UserError where those of something else are there."""
        for name, images in self.image_sets.items():
            build_features(self.maker, images, self.folder / name, self.overwrite)

    @cached_property
    def indices(self) -> list[RemovalIndex]:
        """The features of each set. Raises UserError where they are missing."""
        return [
            RemovalIndex(self.model, images, self.settings, self.folder / name)
            for name, images in self.image_sets.items()
        ]

    @property
    def losses(self) -> dict[str, np.ndarray]:
        """{name of a set: losses [n] of its images}, as `FeatureMaker.explain` tells them."""
        return {name: index.losses for name, index in zip(self.image_sets, self.indices)}

    @property
    def known_repeats(self) -> np.ndarray | None:
        """How often training saw each candidate, [N], None where it is not told."""
        return np.array(self.repeats) if self.repeats else None

    def blocks(self) -> Iterator[np.ndarray]:
        """The features of all candidates, block by block: see `RemovalIndex.blocks`."""
        for index in self.indices:
            yield from index.blocks()

    def take(self, timestep: int, rows: Sequence[int]) -> Iterator[np.ndarray]:
        """The features of some candidates at a timestep, [images, rows, size] float64, in blocks.
        rows: sorted."""
        wanted, start, repeats = np.asarray(rows), 0, self.known_repeats
        for index in self.indices:
            own = wanted[(start <= wanted) & (wanted < start + index.num_images)] - start
            done = 0
            for block in index.take(own, timestep):
                some = start + own[done : done + len(block)]
                done += len(block)
                yield weigh(block, None if repeats is None else repeats[some])
            start += index.num_images

    @cached_property
    def solution_identity(self) -> dict:
        """Identity of what is known of the features, whatever the query."""
        features = [
            [feature_identity(self.model, images, self.settings), hash_file(index.folder / LISTING)]
            for images, index in zip(self.image_sets.values(), self.indices)
        ]
        repeats = {"repeats": digest(list(self.repeats))} if self.repeats else {}
        return {"image_features": digest(features), "ridge": self.ridge, **repeats}

    def solve(self, timestep: int, blocks: Blocks) -> Solution:
        """The Solution of a timestep, by its number, that stands beside the features."""
        make = lambda: solve(blocks, self.settings.sketch_size, self.ridge)
        return keep_solution(
            self.folder / "solved", timestep, self.solution_identity, self.model.device, make
        )

    def inverse(self, timestep: int) -> Inverse:
        """X -> X M of a timestep, by its number."""
        at = partial(at_timestep, self.blocks, timestep, self.known_repeats)
        solution = self.solve(timestep, at)
        return invert(solution.matrix, at, self.ridge * solution.mean_square)

    def find_cells(self, query: TrainingSet) -> np.ndarray | None:
        """The cells [h, w] of a query's latent that count, None where all do. Raises UserError where
        the box does not fit its picture."""
        return query_cells(self.box, query, self.model.pipeline.vae_scale_factor)

    def score_all(
        self, queries: Sequence[TrainingSet], groups: Groups | None = None, set_size: int = 0
    ) -> Scored:
        """What the features, which must be there, say of some queries: of each candidate, of groups of
        them, and of `set_size` that are chosen together. Raises UserError where a group is none."""
        named = groups or {}
        check_groups(named, self.num_images)
        features = np.stack(
            [self.maker.make(query, [0], self.find_cells(query))[0] for query in queries]
        )
        found = []

        def tell(timestep: int, rows: np.ndarray, inverse: Inverse) -> None:
            found.append(group_rises(named, partial(self.take, timestep), rows, inverse))

        draws, units = score_draws(
            self.blocks, features, self.ridge, self.known_repeats, tell, self.solve
        )
        sets = []
        if set_size:
            scores = draws.sum(axis=0)
            sets = choose_sets(scores, features, set_size, self.take, self.inverse)
        return Scored(draws, units, np.stack(found), sets)

    def score_draws(self, queries: Sequence[TrainingSet]) -> tuple[np.ndarray, np.ndarray]:
        """`draws` and `units` of `score_all`."""
        scored = self.score_all(queries)
        return scored.draws, scored.units

    def score(self, queries: Sequence[TrainingSet]) -> np.ndarray:
        """Scores [queries, N] float64 of every candidate: the sum of `score_draws`."""
        return self.score_draws(queries)[0].sum(axis=0)
