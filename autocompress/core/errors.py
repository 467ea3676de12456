"""Errors a user can act on; the command line turns each into exit code 2 and one message."""

from __future__ import annotations

from collections.abc import Sequence


class AutocompressError(Exception):
    """Base of every error that names a rule, the value that broke it and the way out."""


class RecipeError(AutocompressError):
    """A recipe, an override or an argument is wrong.

    Args:
        faults: every fault found, one line each; all of them are shown at once.
    """

    def __init__(self, faults: Sequence[str] | str) -> None:
        self.faults: tuple[str, ...] = (faults,) if isinstance(faults, str) else tuple(faults)
        super().__init__("\n".join(self.faults))


class InfeasibleBudgetError(AutocompressError):
    """No plan of the problem meets the budget; the message says the smallest reachable cost."""


class UnsupportedModelError(AutocompressError):
    """The network holds something that cannot be followed; the message names the layer and the remedy."""


class DataError(AutocompressError):
    """The data is missing, broken or does not fit the network."""


class CheckpointError(AutocompressError):
    """A checkpoint is truncated, unsafe, altered, or of another network."""


class DivergenceError(AutocompressError):
    """Training or evaluation produced values that are not finite."""


class ExportError(AutocompressError):
    """The exported file is invalid or disagrees with the PyTorch network."""


class WorkerError(AutocompressError):
    """Plans cannot be scored in other processes, or one of them takes its process down."""


class RunDirectoryError(AutocompressError):
    """The run directory is in use, belongs to another recipe, or cannot be written."""
