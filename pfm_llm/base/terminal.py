"""Text from files and networks, made fit to be shown on a terminal."""

import unicodedata


def harmless(text: str) -> str:
    """The text on one line, without control characters and invisible ones.

    An escape sequence in a title could clear the screen, and a line end could forge a line.
    """
    return printable(" ".join(text.split()))


def printable(text: str) -> str:
    """The text with its line ends and tabs, without other control characters and invisible ones.

    For messages of several lines. A single foreign value belongs into `harmless` first.
    """
    return "".join(
        c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text
    )


def fitted(text: str, width: int) -> str:
    """The text in exactly ``width`` columns: filled with spaces, or cut with an ellipsis."""
    if columns(text) > width:
        while columns(text) >= width:
            text = text[:-1]
        text = f"{text.rstrip()}…"
    return text + " " * (width - columns(text))


def columns(text: str) -> int:
    """Columns that a printable text takes: two for a wide East Asian letter, none for an accent."""
    return sum(
        0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF")
        for c in text
    )
