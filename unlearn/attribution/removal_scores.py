"""Scores by removal, of features: linear algebra in float64, block by block of the images."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NoReturn

import numpy as np
import torch

from ..errors import UserError

Inverse = Callable[[np.ndarray], np.ndarray]  # X [n, size] -> X (Phi^T Phi + lambda I)^-1
Blocks = Callable[[], Iterator[np.ndarray]]  # features, block by block of the images
RIDGE = 0.1  # lambda, as a multiple of the mean squared norm of a row
GATHERED = 8  # blocks of so many rows or more, as a part of a row's numbers, are multiplied at once
LEAST_OWN = 1e-9  # of I - Phi_i M Phi_i^T: what rounding leaves of a smaller eigenvalue is noise


@dataclass(frozen=True)
class Solution:
    """What every query of a timestep is scored by, float64; M = (Phi^T Phi + lambda I)^-1."""

    # Where Phi has as many rows as columns or more, the Cholesky factor of Phi^T Phi + lambda I,
    # [size, size]; else (Phi Phi^T + lambda I)^-1, [rows, rows].
    matrix: np.ndarray
    mean_square: float  # squared norm of a row of Phi
    own: np.ndarray  # I - Phi_i M Phi_i^T of each image, [N, rows, rows]


def ridge_inverse(blocks: Blocks, size: int, ridge: float) -> tuple[Inverse, float]:
    """X -> X (Phi^T Phi + lambda I)^-1 for rows X [n, size] float64, and the mean squared norm of
    the rows of Phi; lambda is `ridge` times that. blocks: see `solve`."""
    matrix, mean_square = factorise(blocks, size, ridge)
    return invert(matrix, blocks, ridge * mean_square), mean_square


def gather(blocks: Iterable[np.ndarray], num_rows: int) -> Iterator[np.ndarray]:
    """Blocks of images, [images, rows, size], joined until they have so many rows: products of few
    rows are slow."""
    held = []
    for block in blocks:
        held.append(block)
        if sum(len(part) for part in held) * block.shape[1] >= num_rows:
            yield np.concatenate(held)
            held = []
    if held:
        yield np.concatenate(held)


def factorise(blocks: Blocks, size: int, ridge: float) -> tuple[np.ndarray, float]:
    """`matrix` and `mean_square` of a Solution. Where there are fewer rows than columns the matrix of
    their products is inverted: (Phi^T Phi + lambda I)^-1 = (I - Phi^T (Phi Phi^T + lambda I)^-1 Phi)
    / lambda. So no more is held than size x size numbers, and a few blocks. Raises UserError where
    lambda is too small for it."""
    held, gram, num_rows, squares = [], None, 0, 0.0
    for block in gather(blocks(), size // GATHERED):
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
    mean_square = squares / num_rows
    damping = ridge * mean_square
    if gram is None:
        rows = np.concatenate(held)
        products = rows @ rows.T
        check_ridge(ridge, damping, products)
        return np.linalg.inv(products + damping * np.eye(num_rows)), mean_square
    check_ridge(ridge, damping, gram)
    gram[np.diag_indices(size)] += damping
    return torch.linalg.cholesky(torch.from_numpy(gram)).numpy(), mean_square


def invert(matrix: np.ndarray, blocks: Blocks, damping: float) -> Inverse:
    """X -> X M, by what `factorise` gives of the same blocks."""
    size = next(blocks()).shape[-1]
    if len(matrix) == size:
        factor = torch.from_numpy(matrix)
        return lambda rows: torch.cholesky_solve(torch.from_numpy(rows.T), factor).numpy().T
    phi = np.concatenate([block.reshape(-1, size) for block in blocks()])
    return lambda rows: (rows - (rows @ phi.T) @ matrix @ phi) / damping


def solve(blocks: Blocks, size: int, ridge: float) -> Solution:
    """The Solution of the features of all images at one timestep. blocks() yields Phi in blocks of
    images, [images, rows, size] float64, and is gone through twice, or a third time where it has few
    rows. Raises UserError where lambda, `ridge` times a row's mean squared norm, is too small."""
    matrix, mean_square = factorise(blocks, size, ridge)
    inverse = invert(matrix, blocks, ridge * mean_square)
    own = [
        remaining(block, inverse(block.reshape(-1, size)))
        for block in gather(blocks(), size // GATHERED)
    ]
    return Solution(matrix, mean_square, np.concatenate(own))


def remaining(block: np.ndarray, solved: np.ndarray) -> np.ndarray:
    """I - Phi_i M Phi_i^T of each image of a block [images, rows, size], [images, rows, rows];
    solved: its rows times M. Raises LinAlgError where an image's rows are all that there is of their
    direction."""
    own = np.eye(block.shape[1]) - solved.reshape(block.shape) @ block.swapaxes(1, 2)
    if not (np.linalg.eigvalsh(own) > LEAST_OWN).all():  # lambda's part of each row is above 0
        raise np.linalg.LinAlgError("an image's rows are all that there is of their direction")
    return own


def check_ridge(ridge: float, damping: float, gram: np.ndarray) -> None:
    """Raises UserError where rounding swallows what is added to a matrix before it is inverted."""
    if not damping > len(gram) * np.finfo(np.float64).eps * gram.diagonal().max():
        refuse_ridge(ridge)


def refuse_ridge(ridge: float) -> NoReturn:
    """Raises UserError: the inverse fails with this ridge."""
    raise UserError(
        f"ridge {ridge:g}: too small for these features, whose inverse fails; give a larger one, "
        f"such as --ridge {RIDGE:g}"
    )


def removal_rises(block: np.ndarray, queries: np.ndarray, inverse: Inverse) -> np.ndarray:
    """`solved_rises` of a block whose images' own parts are not known yet. queries: [queries, rows,
    size]; inverse: of rows that hold the block's."""
    own = remaining(block, inverse(block.reshape(-1, block.shape[-1])))
    return solved_rises(block, np.stack([inverse(rows) for rows in queries]), own)


def solved_rises(block: np.ndarray, solved: np.ndarray, own: np.ndarray) -> np.ndarray:
    """The rise of phi_q^T M phi_q when an image's rows are removed, exactly: phi_q^T M Phi_i^T (I -
    Phi_i M Phi_i^T)^-1 Phi_i M phi_q, summed over the query's rows: [queries, images] float64.

    block: [images, rows, size]; solved: queries' rows times M, [queries, rows, size]; own: see
    `remaining`, [images, rows, rows]. Source: Woodbury's identity.
    """
    shared = block[:, None] @ solved.swapaxes(1, 2)  # [images, queries, rows, rows of the query]
    return (shared * np.linalg.solve(own[:, None], shared)).sum(axis=(2, 3)).T


def score_removal(
    blocks: Blocks,
    queries: np.ndarray,
    ridge: float = RIDGE,
    repeats: np.ndarray | None = None,
) -> np.ndarray:
    """Scores [queries, N] float64 of every training image: the sum of `score_draws` over the
    timesteps."""
    return np.sum(score_draws(blocks, queries, ridge, repeats)[0], axis=0)


def score_draws(
    blocks: Blocks,
    queries: np.ndarray,
    ridge: float = RIDGE,
    repeats: np.ndarray | None = None,
    tell: Callable[[int, np.ndarray, Inverse], object] | None = None,
    solution_of: Callable[[int, Blocks], Solution] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Scores [timesteps, queries, N] float64 of every training image at each timestep, and their
    units [timesteps, queries]: the squared norm of the query's rows over the mean one of the
    images'. Scores in such units compare queries, models and timesteps.

    blocks() yields the features of the training set [images, timesteps, rows, size], in its order;
    queries: theirs, [queries, timesteps, rows, size]; repeats: how often training saw each image,
    [N], where that is known and not alike: an image seen four times counts as four; tell: is given
    each timestep's number, queries' rows and X -> X M; solution_of: gives the Solution of a
    timestep, by its number and features, where it is known; then `blocks` is gone through once, and
    once more a timestep where M is held by rows.
    """
    size, solved, own, units = queries.shape[-1], [], [], []
    for timestep in range(queries.shape[1]):
        at = partial(at_timestep, blocks, timestep, repeats)
        rows = np.asarray(queries[:, timestep], np.float64)
        try:
            solution = solution_of(timestep, at) if solution_of else solve(at, size, ridge)
            inverse = invert(solution.matrix, at, ridge * solution.mean_square)
            # One by one: a query's bits must not depend on those beside it.
            solved.append(np.stack([inverse(own_rows) for own_rows in rows]))
            if tell:
                tell(timestep, rows, inverse)
        except np.linalg.LinAlgError:
            refuse_ridge(ridge)
        own.append(solution.own)
        units.append(np.square(rows).sum(axis=(1, 2)) / solution.mean_square)
    scores, start = [], 0
    for block in blocks():
        some = slice(start, start + len(block))
        start += len(block)
        times = None if repeats is None else repeats[some]
        scores.append(
            [
                solved_rises(weigh(block[:, number], times), solved[number], own[number][some])
                for number in range(queries.shape[1])
            ]
        )
    return np.concatenate(scores, axis=-1), np.stack(units)


def at_timestep(blocks: Blocks, timestep: int, repeats: np.ndarray | None) -> Iterator[np.ndarray]:
    """The features at one timestep, block by block, [images, rows, size] float64, each image as
    often as training saw it."""
    start = 0
    for block in blocks():
        own = slice(start, start + len(block))
        yield weigh(block[:, timestep], None if repeats is None else repeats[own])
        start += len(block)


def weigh(features: np.ndarray, repeats: np.ndarray | None) -> np.ndarray:
    """Features [images, rows, size] in float64, each image's rows as if there as often as training
    saw it."""
    features = np.asarray(features, np.float64)
    return features if repeats is None else features * np.sqrt(repeats)[:, None, None]
