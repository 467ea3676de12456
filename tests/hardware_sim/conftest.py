from __future__ import annotations

from dataclasses import replace

import pytest

from autocompress.core import Bits, ChannelGroup, LayerGraph, LayerSpec, Width


@pytest.fixture
def two_layers() -> LayerGraph:
    """Two convolutions at 8 bits; the 12 channels between them can be pruned."""
    first = LayerSpec("a", "conv", 3, 12, (3, 3), in_hw=(20, 20), out_hw=(20, 20), bits=Bits(8, 8))
    first = replace(first, in_width=Width(3), out_width=Width(terms=(("g", 1),)))
    second = replace(first, name="b", in_channels=12, out_channels=7, kernel=(1, 1))
    second = replace(second, in_width=Width(terms=(("g", 1),)), out_width=Width(7))
    return LayerGraph((first, second), (ChannelGroup("g", 12, ("a",), ("b",)),), input_shape=(3, 20, 20))
