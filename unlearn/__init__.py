"""Which training images made this picture? Data attribution for text-to-image models by unlearning synthesized images."""

__version__ = "0.1.0"


class UserError(Exception):
    """A mistake of the user's, told in one line: the item, what was expected, what was found, what to do.

    Scripts and commands print it and end with status 2 (`runtime.run`).
    """
