"""Names of ways of scoring, for those who ask before anything heavy is imported."""

REMOVAL = "removal"
FRONT_SCORINGS = (REMOVAL, "exact")  # of `attribute`, the default first; exact: as published
