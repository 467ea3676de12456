"""Which channels go, and how what remains is repaired."""

from autocompress.prune.importance import METHODS, keep_best, unit_scores
from autocompress.prune.knobs import channel_knobs
from autocompress.prune.reconstruct import Reconstruction

__all__ = ["METHODS", "Reconstruction", "channel_knobs", "compress_channels", "keep_best", "unit_scores"]

from collections.abc import Mapping

from torch import Tensor, nn

from autocompress.core.plan import Plan
from autocompress.trace import Trace, shrink


def compress_channels(
    model: nn.Module,
    plan: Plan,
    *,
    traced: Trace,
    scores: Mapping[str, Tensor],
    reconstruction: Reconstruction | None = None,
) -> nn.Module:
    """The network with the channels of a plan, physically smaller; the input is not changed.

    Args:
        model: the network that was traced.
        plan: channels to keep per group.
        traced: its trace.
        scores: importance of every unit, from :func:`unit_scores`; the best are kept.
        reconstruction: when given, the layers that lost inputs are refitted to their original outputs.

    Raises:
        ValueError: the plan names a group the network lacks or a size it cannot have.
    """
    kept = keep_best(scores, plan.channels)
    small = shrink(model, traced, kept)
    if reconstruction is not None:
        reconstruction.apply(small, kept)
    return small
