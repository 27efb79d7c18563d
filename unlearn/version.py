"""The version, for records too: they are below what `unlearn` itself imports."""

__version__ = "0.1.0"
