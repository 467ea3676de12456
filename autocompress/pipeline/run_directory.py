"""The folder of one run: locked while in use, every file whole or absent."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout

from autocompress.core.errors import RunDirectoryError
from autocompress.core.files import TEMPORARY, write_atomically
from autocompress.pipeline.recipe import Recipe

LOCK = ".lock"
LEDGER = "ledger.sqlite"


class RunDirectory:
    """Files of one run, held by one process at a time.

    Use :meth:`create` or :meth:`open`; leave with :meth:`close` or as a context manager.

    Args:
        path: the folder; it exists.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = FileLock(path / LOCK)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise RunDirectoryError(
                f"{path} is in use by another process; wait for it or choose another --out"
            ) from None
        except OSError as fault:
            raise RunDirectoryError(f"cannot lock {path}: {fault}") from fault

    @classmethod
    def create(cls, path: Path, recipe: Recipe) -> RunDirectory:
        """A new folder that holds the recipe.

        Raises:
            RunDirectoryError: the folder exists and is not empty, or cannot be written.
        """
        if not _is_free(path):
            raise RunDirectoryError(
                f"{path} exists and is not empty; resume it with `autocompress run --resume {path}` "
                "or choose another --out"
            )
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as fault:
            raise RunDirectoryError(f"cannot create {path}: {fault}") from fault
        directory = cls(path)
        try:
            directory.write("recipe.yaml", recipe.to_yaml())
        except BaseException:
            directory.close()
            raise
        return directory

    @classmethod
    def open(cls, path: Path) -> RunDirectory:
        """An existing run.

        Raises:
            RunDirectoryError: not a run directory, or in use.
        """
        if not (path / "recipe.yaml").is_file():
            raise RunDirectoryError(f"{path} is not a run directory: it holds no recipe.yaml")
        return cls(path)

    @classmethod
    def open_or_create(cls, path: Path, recipe: Recipe) -> RunDirectory:
        """The run in a folder, or a new one there.

        Raises:
            RunDirectoryError: it belongs to another recipe, is in use, or holds something else.
        """
        if not (path / "recipe.yaml").exists():
            return cls.create(path, recipe)
        directory = cls.open(path)
        if directory.recipe.digest != recipe.digest:
            directory.close()
            raise RunDirectoryError(f"{path} belongs to another recipe; choose another folder")
        return directory

    @staticmethod
    def next_free(parent: Path, name: str) -> Path:
        """``parent/name``, or with the lowest free suffix ``-2``, ``-3``, ..."""
        path, count = parent / name, 1
        while not _is_free(path):
            count += 1
            path = parent / f"{name}-{count}"
        return path

    @property
    def recipe(self) -> Recipe:
        """The recipe the run was started with."""
        return Recipe.load(self.path / "recipe.yaml")

    def write(self, name: str, text: str) -> None:
        """Write a file so that it is never half there.

        Raises:
            RunDirectoryError: the disk is full or the folder cannot be written; an older file stays.
        """
        write_atomically(self.path / name, text.encode())

    def write_json(self, name: str, value: Any) -> None:
        """Write a value as JSON; see :meth:`write`."""
        self.write(name, json.dumps(value, indent=1, sort_keys=True))

    def read_json(self, name: str) -> Any:
        """The value of a JSON file, or None when the file is not there yet."""
        path = self.path / name
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def close(self) -> None:
        """Release the folder."""
        self._lock.release()

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _is_free(path: Path) -> bool:
    """Whether a run may start there: nothing, or what a run killed before its recipe was written leaves."""
    if not path.exists():
        return True
    return path.is_dir() and all(p.name == LOCK or p.name.endswith(TEMPORARY) for p in path.iterdir())
