"""What a run says about itself while it works."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Event:
    """One step of a run.

    Args:
        stage: what is being done, e.g. ``search ddpg``.
        done, total: steps finished and steps there are.
        figures: what to show beside the bar, name -> text.
    """

    stage: str
    done: int
    total: int
    figures: Mapping[str, str] = field(default_factory=dict)


OnEvent = Callable[[Event], None]


def silent(event: Event) -> None:
    """Shows nothing."""
