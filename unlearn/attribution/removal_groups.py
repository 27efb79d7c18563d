"""Scores by removal of whole groups of images: what the query's prediction would lose without all of
their rows at once, which is no sum of what it would lose without each."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from ..errors import UserError
from .removal_scores import Inverse, removal_rises

Groups = Mapping[str, Sequence[int]]  # name -> rows of its images among all candidates


def check_groups(groups: Groups, num_images: int) -> None:
    """Raises UserError where a group is empty, names an image twice or one that is not there, or
    holds them all, so that nothing would be left."""
    for name, rows in groups.items():
        if not len(rows) or len(set(rows)) < len(rows):
            raise UserError(f"group {name}: expected one image or more, each once")
        if min(rows) < 0 or max(rows) >= num_images:
            raise UserError(
                f"group {name}: image {max(rows) if min(rows) >= 0 else min(rows)}: expected 0 to "
                f"{num_images - 1}, the images that are ranked"
            )
        if len(rows) == num_images:
            raise UserError(
                f"group {name}: holds all {num_images} images: without them nothing would be left "
                f"to tell from; leave it out"
            )


def rise_without(blocks: Iterable[np.ndarray], queries: np.ndarray, inverse: Inverse) -> np.ndarray:
    """The rise of phi_q^T M phi_q when all rows of a group are removed together, exactly, summed
    over the query's rows: [queries] float64.

    blocks: the group's own features, [images, rows, size]; queries: [queries, rows, size]; inverse:
    X -> X M, of `ridge_inverse` of rows that hold the group's. A group of fewer rows than numbers is
    one block of Woodbury's identity; of a larger one G = Phi_G^T Phi_G is summed, and (A - G)^-1 = M
    (I - G M)^-1, so that never more than size x size numbers are held.
    """
    size, held, gram = queries.shape[-1], [], None
    for block in blocks:
        held.append(block.reshape(-1, size))
        if gram is not None or sum(map(len, held)) >= size:
            gram = np.zeros((size, size)) if gram is None else gram
            for rows in held:
                gram += rows.T @ rows
            held = []
    if gram is None:
        return removal_rises(np.concatenate(held)[None], queries, inverse)[:, 0]
    solved = inverse(queries.reshape(-1, size))  # rows of Phi_q M
    left = np.linalg.solve(np.eye(size) - inverse(gram), gram @ solved.T)
    return (solved.T * left).sum(axis=0).reshape(len(queries), -1).sum(axis=1)


def group_rises(
    groups: Groups,
    take: Callable[[Sequence[int]], Iterable[np.ndarray]],
    queries: np.ndarray,
    inverse: Inverse,
) -> np.ndarray:
    """`rise_without` of each group, [queries, groups] float64. take(rows): the features of some
    images, block by block."""
    rises = [rise_without(take(sorted(rows)), queries, inverse) for rows in groups.values()]
    return np.stack(rises, axis=1) if rises else np.empty((len(queries), 0))
