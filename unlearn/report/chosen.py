"""Images that are chosen together, as tables and pages tell of them."""

from collections.abc import Sequence

MOST_NAMED = 10  # in a line on screen
MEANS = "gone at once, they would leave the model least certain of the picture"


def is_ranking(ranks: Sequence[int]) -> bool:
    """Whether the images chosen together are the first of the ranking. ranks: of theirs, from 1."""
    return set(ranks) == set(range(1, len(ranks) + 1))


def describe_set(names: Sequence[str], ranks: Sequence[int], num_shown: int) -> str:
    """Which images are chosen together, in a sentence below a table of the first `num_shown`; ""
    where there are fewer than two. names, ranks: in the order in which they were chosen."""
    count = len(ranks)
    if count < 2:
        return ""
    if is_ranking(ranks):
        return f"Missed most together: the first {count} again ({MEANS})."
    told = [
        str(rank) if rank <= num_shown else f"{rank} ({name})" for rank, name in zip(ranks, names)
    ]
    more = f", and {count - MOST_NAMED} more" if count > MOST_NAMED else ""
    return f"Missed most together: ranks {', '.join(told[:MOST_NAMED])}{more} ({MEANS})."
