"""Names of ways of scoring, for those who ask before anything heavy is imported."""

REMOVAL, OUTPUT = "removal", "output"
NAMED = (REMOVAL, OUTPUT)  # those that evaluations call by their names; all others are `ours`
FRONT_SCORINGS = (
    REMOVAL,
    "exact",
    OUTPUT,
)  # of `attribute`, the default first; exact: as published
