"""How many draws of noise and timestep unlearning needs: its weight change against that of very
many published draws."""

from collections.abc import Iterable

import numpy as np
import torch

from ..attribution.draws import PublishedDraws, QueryDraws
from ..attribution.newton import query_gradient
from ..runtime.programs import log
from .meters import metered
from .workloads import Bench

REFERENCE_DRAWS = 16_000  # [AbU]'s, on the AbC benchmark
PUBLISHED_BATCH = 16


def find_direction(
    bench: Bench, query: int, draws: QueryDraws | PublishedDraws, num_draws: int, pass_size: int
) -> np.ndarray:
    """F^-1 grad L of a query over `num_draws` draws, flattened: float64, on the CPU."""
    world = bench.world
    gradient = query_gradient(
        world.model, world.parameters, *world.query(query), draws, 0, num_draws, pass_size
    )
    return torch.cat(
        [part.double().flatten().cpu() for part in world.fisher.precondition(gradient).values()]
    ).numpy()


def published_draws(bench: Bench, seed: int) -> PublishedDraws:
    """The published program's draws: independent noise, timesteps without replacement in each batch
    of 16."""
    return PublishedDraws(seed, bench.world.model.num_train_timesteps, bench.world.model.device)


def compare(found: np.ndarray, reference: np.ndarray) -> tuple[float, float]:
    """Cosine with a reference, and the norm of the difference relative to its norm."""
    norms = np.linalg.norm(found), np.linalg.norm(reference)
    return float(found @ reference / norms[0] / norms[1]), float(
        np.linalg.norm(found - reference) / norms[1]
    )


def measure_draws(bench: Bench, counts: Iterable[int]) -> list[dict]:
    """One row for each number of draws, means over queries: cosine and relative error of our draws
    and of the published ones with REFERENCE_DRAWS published draws of another seed, and the seconds
    a query that ours took."""
    world, settings, rows = bench.world, bench.settings, []
    queries = range(settings.num_exact)
    references = [
        find_direction(
            bench,
            query,
            published_draws(bench, settings.seed + 1),
            REFERENCE_DRAWS,
            PUBLISHED_BATCH,
        )
        for query in queries
    ]
    for count in counts:
        pairs = {"ours": [], "published": []}
        with metered(world.model.device) as costs:
            for query, reference in zip(queries, references):
                draws = QueryDraws(
                    settings.seed,
                    world.training_set.name,
                    f"query {query}",
                    world.model.num_train_timesteps,
                )
                pairs["ours"].append(
                    compare(
                        find_direction(bench, query, draws, count, settings.gradient_batch_size),
                        reference,
                    )
                )
        for query, reference in zip(queries, references):
            found = find_direction(
                bench, query, published_draws(bench, settings.seed), count, PUBLISHED_BATCH
            )
            pairs["published"].append(compare(found, reference))
        rows.append(
            {
                "draws": count,
                "seconds": costs["seconds"] / len(queries),
                **{
                    name: dict(zip(("cosine", "relative_error"), np.mean(values, axis=0).tolist()))
                    for name, values in pairs.items()
                },
            }
        )
        log.info(
            f"{count} draws: cosine {rows[-1]['ours']['cosine']:.4f}, published "
            f"{rows[-1]['published']['cosine']:.4f}"
        )
    return rows
