"""The errors of a user's mistake."""


class UserError(Exception):
    """A mistake of the user's, told in one line: the item, what was expected, what was found, what
    to do.

    Scripts and commands print it and end with status 2 (`runtime.run`).
    """


class NotThere(UserError):
    """A file is not there, or not any more: another process may be making it anew."""
