"""The command line called from within a test."""

from __future__ import annotations

import sys

import pytest

from autocompress import cli


def command(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of one call, line breaks of errors undone."""
    before = sys.argv
    sys.argv = ["autocompress", *words]
    try:
        with pytest.raises(SystemExit) as ended:
            cli.main()
    finally:
        sys.argv = before
    captured = capsys.readouterr()
    return int(ended.value.code or 0), captured.out, " ".join(captured.err.split())
