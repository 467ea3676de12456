"""When a search ends: at the first rise of the loss on samples that neither split of it has seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from autocompress.core.errors import DataError, RecipeError
from autocompress.training import Samples


@dataclass(frozen=True, eq=False)
class HoldOut:
    """Samples whose loss decides which epoch's member is kept, and when to stop.

    The loss is that of the supernet as its weights are trained, without dropout. It is measured after every
    epoch that moved the logits. The member kept is the one derived after the epoch of the lowest loss; the
    search ends once ``patience`` epochs in a row have not come down to it again.

    Marvasti-Zadeh et al., CHASE, arXiv 2107.03463, and its released code, where the loss is measured so and a
    reader picks the genotype before it rises: ``patience`` 1.

    Args:
        samples: in neither the training nor the search split.
        patience: epochs.

    Raises:
        DataError: fewer than 2 samples.
        RecipeError: a patience below 1.
    """

    samples: Samples
    patience: int = 1

    def __post_init__(self) -> None:
        if self.patience < 1:
            raise RecipeError(f"patience must be >= 1, got {self.patience}")
        if len(self.samples) < 2:
            raise DataError(f"a hold-out needs at least 2 samples, got {len(self.samples)}")

    def best(self, losses: Sequence[float | None]) -> int:
        """The epoch whose member is kept; the later of equal ones.

        Args:
            losses: one per epoch, None where it was not measured.
        """
        measured = [(loss, -epoch) for epoch, loss in enumerate(losses) if loss is not None]
        return -min(measured)[1] if measured else len(losses) - 1

    def is_over(self, losses: Sequence[float | None]) -> bool:
        """Whether the search ends after these epochs."""
        return len(losses) - 1 - self.best(losses) >= self.patience
