"""Text from outside, safe to show: it never breaks a line, commands a terminal, or ends a program
that cannot show it."""

import logging
import re
import sys

# Control characters, line and paragraph separators, what changes the direction of writing, halves
# of characters, the byte order mark.
UNSAFE = re.compile(
    "[\0-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff]"
)


def printable(text: object) -> str:
    """Any value as one line of text: what would end the line, command a terminal or hide what is
    there stands escaped."""
    return UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode(), str(text))


def shorten(text: object, length: int = 60) -> str:
    """`printable`, at most so many characters."""
    text = printable(text)
    return text if len(text) <= length else text[: length - 1] + "…"


def show(*lines: object) -> None:
    """Prints lines, each `printable`."""
    for line in lines:
        print(printable(line))


def make_streams_safe() -> None:
    """From here on, output that the terminal's encoding lacks is escaped; without this, printing it
    would end the program."""
    for stream in sys.stdout, sys.stderr:
        reconfigure = getattr(stream, "reconfigure", None)  # what stands in for it may have none
        if reconfigure:
            reconfigure(errors="backslashreplace")


class LineFormatter(logging.Formatter):
    """Log messages as one `printable` line each."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Source: logging.Formatter, which calls it before it appends a traceback."""
        return printable(super().formatMessage(record))
