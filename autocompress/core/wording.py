"""Phrases that messages share."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """``; did you mean 'x'?`` with the known word closest to a misspelt one, or nothing.

    Example:
        >>> did_you_mean("macz", ["macs", "params"])
        "; did you mean 'macs'?"
    """
    close = difflib.get_close_matches(str(word), list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
