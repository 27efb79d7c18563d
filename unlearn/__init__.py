"""Which training images made this picture? Data attribution for text-to-image models by unlearning
synthesized images."""

from .errors import UserError

__version__ = "0.1.0"
__all__ = ["UserError", "__version__"]
