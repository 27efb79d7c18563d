"""Images that are chosen together: what a query's prediction would miss most without all of them at
once. The first of a ranking are not that set: images stand in for each other, and a score tells
what is lost without one alone."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from .influence import rank_images
from .removal_scores import Inverse

MOST_ROWS = 1024  # of the candidates that a set is chosen from: all of them against all
AT_ONCE = 8  # queries: what is known of their candidates' pairs takes 8 MB a timestep each
MOST_ROUNDED = 0.01  # of what is left of an image's own part: what rounding may be of it


@dataclass(frozen=True)
class ChosenSet:
    """Images of one query, in the order in which they were chosen."""

    rows: np.ndarray  # [K] int64, among all candidates
    rises: np.ndarray  # [K] float64: what each adds where those before it are gone

    @property
    def score(self) -> float:
        """What the query's prediction would lose without all of them."""
        return float(self.rises.sum())


def pick_candidates(scores: np.ndarray, num_rows: int) -> np.ndarray:
    """The images that a set is chosen from, sorted: those of the highest scores [N], as many as
    MOST_ROWS rows of features allow. num_rows: of an image. What is near 0 alone because of more
    twins than that is not seen."""
    return np.sort(rank_images(scores)[: max(1, MOST_ROWS // num_rows)])


def compare(
    blocks: Iterable[np.ndarray], query: np.ndarray, inverse: Inverse
) -> tuple[np.ndarray, np.ndarray]:
    """Phi M Phi^T [C, rows, C, rows] and Phi M phi_q^T [C, rows, rows of the query] of some images.

    blocks: their features at one timestep, [images, rows, size] float64; query: its rows there;
    inverse: X -> X M."""
    features = np.concatenate(list(blocks))
    flat = features.reshape(-1, features.shape[-1])
    count, num_rows = features.shape[:2]
    solved = inverse(flat)
    products = solved @ flat.T
    along = solved @ np.asarray(query, np.float64).T
    return (
        products.reshape(count, num_rows, count, num_rows),
        along.reshape(count, num_rows, -1),
    )


def choose_set(compared: Sequence[tuple[np.ndarray, np.ndarray]], count: int) -> ChosenSet:
    """`count` images, one after the other, each the one that would be missed most where those before
    it are gone: places among the candidates. compared: of each timestep, see `compare`. There are
    fewer where the ridge is so small, and the next image so like those before it, that its own part
    is lost in rounding.

    Without an image j, M becomes M + M Phi_j^T (I - Phi_j M Phi_j^T)^-1 Phi_j M (Woodbury), so that
    what is known of each pair of images follows without the features; lambda stays what it was.
    """
    held = [(products.copy(), along.copy()) for products, along in compared]
    errors = [rounding(products) for products, _ in compared]
    chosen, rises = [], []
    for _ in range(count):
        try:
            found = np.sum([rises_alone(*known) for known in held], axis=0)
        except np.linalg.LinAlgError:
            break
        found[chosen] = -np.inf
        best = int(np.argmax(found))
        if any(is_lost(products, best, error) for (products, _), error in zip(held, errors)):
            break
        chosen.append(best)
        rises.append(found[best])
        for products, along in held:
            remove(products, along, best)
    return ChosenSet(np.array(chosen, np.int64), np.array(rises, np.float64))


def rounding(products: np.ndarray) -> float:
    """What rounding made of Phi M Phi^T [C, rows, C, rows], which is symmetric without it."""
    return float(np.abs(products - products.transpose(2, 3, 0, 1)).max())


def is_lost(products: np.ndarray, image: int, error: float) -> bool:
    """Whether what rounding made of the products is much of the image's I - Phi_i M Phi_i^T."""
    own = np.eye(products.shape[1]) - products[image, :, image]
    return not error < MOST_ROUNDED * np.linalg.eigvalsh(own).min()


def rises_alone(products: np.ndarray, along: np.ndarray) -> np.ndarray:
    """What is lost without each image, [C], where M is what these know of: see `solved_rises`."""
    own = np.eye(products.shape[1]) - np.einsum("irit->irt", products)
    return (along * np.linalg.solve(own, along)).sum(axis=(1, 2))


def remove(products: np.ndarray, along: np.ndarray, gone: int) -> None:
    """Changes what is known of each pair, in place, to what it is without the image `gone`."""
    own = np.eye(products.shape[1]) - products[gone, :, gone]
    towards = np.linalg.solve(own, products[gone].reshape(len(own), -1))  # [rows, C x rows]
    beside = products[:, :, gone] @ np.linalg.solve(own, along[gone])
    products += (products[:, :, gone] @ towards).reshape(products.shape)
    along += beside


def choose_sets(
    scores: np.ndarray,
    queries: np.ndarray,
    count: int,
    take: Callable[[int, Sequence[int]], Iterable[np.ndarray]],
    inverse_of: Callable[[int], Inverse],
) -> list[ChosenSet]:
    """The ChosenSet of each query: `count` images, or all but one where there are no more, or fewer
    as of `choose_set`.

    scores: [queries, N], of images alone; queries: features, [queries, timesteps, rows, size];
    take(timestep, rows): features of some images there; inverse_of(timestep): X -> X M there."""
    found = []
    for start in range(0, len(queries), AT_ONCE):
        some = slice(start, start + AT_ONCE)
        places = [pick_candidates(own, queries.shape[2]) for own in scores[some]]
        compared: list[list] = [[] for _ in places]
        for timestep in range(queries.shape[1]):
            inverse = inverse_of(timestep)
            for rows, known, query in zip(places, compared, queries[some]):
                blocks = take(timestep, rows.tolist())
                known.append(compare(blocks, query[timestep], inverse))
        for rows, known in zip(places, compared):
            chosen = choose_set(known, min(count, len(rows), scores.shape[1] - 1))
            found.append(ChosenSet(rows[chosen.rows], chosen.rises))
    return found
