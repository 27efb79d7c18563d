"""The error of a user's mistake."""


class UserError(Exception):
    """A mistake of the user's, told in one line: the item, what was expected, what was found, what
    to do.

    Scripts and commands print it and end with status 2 (`runtime.run`).
    """
