"""Scores by removal, of features: linear algebra in float64, block by block of the images."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NoReturn

import numpy as np
import torch

from ..errors import UserError

Inverse = Callable[[np.ndarray], np.ndarray]  # X [n, size] -> X (Phi^T Phi + lambda I)^-1
RIDGE = 0.1  # lambda, as a multiple of the mean squared norm of a row
LEAST_OWN = 1e-9  # of I - Phi_i M Phi_i^T: what rounding leaves of a smaller eigenvalue is noise


def ridge_inverse(
    blocks: Callable[[], Iterator[np.ndarray]], size: int, ridge: float
) -> tuple[Inverse, float]:
    """X -> X (Phi^T Phi + lambda I)^-1 for rows X [n, size] float64, and the mean squared norm of
    the rows of Phi; lambda is `ridge` times that.

    blocks() yields Phi in blocks of images, [images, rows, size]. Where there are fewer rows than
    columns the matrix of their products is inverted instead: (Phi^T Phi + lambda I)^-1 = (I - Phi^T
    (Phi Phi^T + lambda I)^-1 Phi) / lambda. So no more is held than size x size numbers, and a
    block. Raises UserError where lambda is too small for it.
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
    mean_square = squares / num_rows
    damping = ridge * mean_square
    if gram is None:
        rows = np.concatenate(held)
        products = rows @ rows.T
        check_ridge(ridge, damping, products)
        inverse = np.linalg.inv(products + damping * np.eye(num_rows))
        by_rows = lambda queries: (queries - (queries @ rows.T) @ inverse @ rows) / damping
        return by_rows, mean_square
    check_ridge(ridge, damping, gram)
    gram[np.diag_indices(size)] += damping
    factor = torch.linalg.cholesky(torch.from_numpy(gram))
    solve = lambda queries: torch.cholesky_solve(torch.from_numpy(queries.T), factor).numpy().T
    return solve, mean_square


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
    """The rise of phi_q^T M phi_q when an image's rows are removed, exactly: phi_q^T M Phi_i^T (I -
    Phi_i M Phi_i^T)^-1 Phi_i M phi_q, summed over the query's rows: [queries, images] float64.

    block: [images, rows, size]; queries: [queries, rows, size]; inverse: of `ridge_inverse` of rows
    that hold the block's. Source: Woodbury's identity.
    """
    solved = inverse(block.reshape(-1, block.shape[-1])).reshape(block.shape)
    own = np.eye(block.shape[1]) - solved @ block.swapaxes(1, 2)
    if not (np.linalg.eigvalsh(own) > LEAST_OWN).all():  # lambda's part of each row is above 0
        raise np.linalg.LinAlgError("an image's rows are all that there is of their direction")
    shared = solved[:, None] @ queries.swapaxes(1, 2)  # [images, queries, rows, rows of the query]
    return (shared * np.linalg.solve(own[:, None], shared)).sum(axis=(2, 3)).T


def score_removal(
    blocks: Callable[[], Iterator[np.ndarray]],
    queries: np.ndarray,
    ridge: float = RIDGE,
    repeats: np.ndarray | None = None,
) -> np.ndarray:
    """Scores [queries, N] float64 of every training image: the sum of `score_draws` over the
    timesteps."""
    return np.sum(score_draws(blocks, queries, ridge, repeats)[0], axis=0)


def score_draws(
    blocks: Callable[[], Iterator[np.ndarray]],
    queries: np.ndarray,
    ridge: float = RIDGE,
    repeats: np.ndarray | None = None,
    tell: Callable[[int, np.ndarray, Inverse], object] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Scores [timesteps, queries, N] float64 of every training image at each timestep, and their
    units [timesteps, queries]: the squared norm of the query's rows over the mean one of the
    images'. Scores in such units compare queries, models and timesteps.

    blocks() yields the features of the training set [images, timesteps, rows, size], in its order;
    queries: theirs, [queries, timesteps, rows, size]; repeats: how often training saw each image,
    [N], where that is known and not alike: an image seen four times counts as four; tell: is given
    each timestep's number, queries' rows and `ridge_inverse`. `blocks` is gone through twice a
    timestep.
    """

    scores = [
        score_timestep(
            partial(at_timestep, blocks, timestep, repeats),
            np.asarray(queries[:, timestep], np.float64),
            ridge,
            partial(tell, timestep) if tell else None,
        )
        for timestep in range(queries.shape[1])
    ]
    return np.stack([found for found, _ in scores]), np.stack([units for _, units in scores])


def at_timestep(
    blocks: Callable[[], Iterator[np.ndarray]], timestep: int, repeats: np.ndarray | None
) -> Iterator[np.ndarray]:
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


def score_timestep(
    blocks: Callable[[], Iterator[np.ndarray]],
    queries: np.ndarray,
    ridge: float,
    tell: Callable[[np.ndarray, Inverse], object] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Scores [queries, N] and units [queries], float64, at one timestep: blocks() yields [images,
    rows, size], queries are [queries, rows, size], all float64. tell: see `score_draws`."""
    inverse, mean_square = ridge_inverse(blocks, queries.shape[-1], ridge)
    try:
        rises = [removal_rises(block, queries, inverse) for block in blocks()]
        if tell:
            tell(queries, inverse)
    except np.linalg.LinAlgError:
        refuse_ridge(ridge)
    units = np.square(queries).sum(axis=(1, 2)) / mean_square
    return np.concatenate(rises, axis=1), units
