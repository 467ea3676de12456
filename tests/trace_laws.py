"""The laws every traced network keeps; for tests."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from autocompress.hardware_sim import MacsModel
from autocompress.trace import Trace, mask, measure, shrink, trace
from autocompress.trace.layers import tensors_in


def random_kept(traced: Trace, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Any number of any units of every prunable group."""
    return {
        g.name: np.sort(rng.choice(g.size, rng.integers(1, g.size + 1), replace=False))
        for g in traced.graph.prunable
    }


def assert_laws_hold(
    model: nn.Module, shape: tuple[int, ...], num_plans: int, *, all_counted: bool = True
) -> Trace:
    """Shrunk = masked to 1e-5 and predicted = measured cost, for random plans; returns the trace.

    With ``all_counted`` torch's own counter must give the same MACs, so that no arithmetic is outside layers.
    """
    before = {name: value.clone() for name, value in model.state_dict().items()}
    traced, rng = trace(model, shape), np.random.default_rng(0)
    images = torch.randn(4, *shape, generator=torch.Generator().manual_seed(0))
    for _ in range(num_plans):
        kept = random_kept(traced, rng)
        small = shrink(model, traced, kept)
        with torch.no_grad():
            pairs = zip(tensors_in(small(images)), tensors_in(mask(model, traced, kept)(images)), strict=True)
            for a, b in pairs:
                torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
        predicted = MacsModel()(traced.graph.with_channels({name: len(k) for name, k in kept.items()}))
        assert sum(p.numel() for p in small.parameters()) == predicted["params"]
        assert measure(small, shape) == {"macs": predicted["macs"], "params": predicted["params"]}
        if all_counted:
            counter = FlopCounterMode(display=False)
            with counter, torch.no_grad():
                small(images[:1])
            assert counter.get_total_flops() == 2 * predicted["macs"]
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)  # the input is never changed
    return traced
