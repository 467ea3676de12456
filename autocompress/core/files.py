"""Files that are whole or absent."""

from __future__ import annotations

import os
from pathlib import Path

from autocompress.core.errors import RunDirectoryError

TEMPORARY = ".tmp"
"""Ending of files that are being written."""


def write_atomically(path: Path, content: bytes) -> Path:
    """Write under a temporary name, force it to disk, and rename.

    Args:
        path: the file; its folder is created when absent.
        content: what it shall hold.

    Raises:
        RunDirectoryError: the disk is full or the folder cannot be written; an earlier file of that name is
            intact and nothing half-written is left.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as fault:
        if temporary.is_file():
            temporary.unlink()
        raise RunDirectoryError(
            f"cannot write {path}: {fault}. Free some space, or check the folder and its permissions; an "
            "earlier file of that name is intact."
        ) from fault
    return path
