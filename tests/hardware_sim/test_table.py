from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from autocompress.core import Bits, ChannelGroup, LayerGraph, LayerSpec, Width
from autocompress.hardware_sim.table import LayerTable


def network() -> LayerGraph:
    """A stem, a depthwise and a grouped convolution, a concatenation, a flatten, a reused layer."""
    a, b = Width(terms=(("a", 1),)), Width(terms=(("b", 4),))
    both, flat = a + b, 16 * (a + b)
    layers = (
        LayerSpec("a", "conv", 3, 12, (3, 3), in_hw=(8, 8), out_hw=(8, 8), in_width=Width(3), out_width=a),
        LayerSpec("dw", "conv", 12, 12, (3, 3), (2, 2), 12, (8, 8), (4, 4), in_width=a, out_width=a),
        LayerSpec("b", "conv", 12, 24, in_hw=(4, 4), out_hw=(4, 4), in_width=a, out_width=b),
        LayerSpec("g", "conv", 24, 24, (3, 1), (1, 1), 6, (4, 4), (4, 4), in_width=b, out_width=b),
        LayerSpec("up", "conv", 36, 5, (2, 2), (2, 2), in_hw=(4, 4), out_hw=(8, 8), in_width=both,
                  out_width=Width(5), transposed=True, bias=True),
        LayerSpec("fc", "linear", 576, 10, in_width=flat, out_width=Width(10), bias=True),
        LayerSpec("fc@2", "linear", 576, 10, in_width=flat, out_width=Width(10), bias=True, reuses="fc"),
    )  # fmt: skip
    groups = (
        ChannelGroup("a", 12, ("a", "dw"), ("b", "up", "fc")),
        ChannelGroup("b", 6, ("b", "g"), ("up", "fc")),
    )
    return LayerGraph(layers, groups, input_shape=(3, 8, 8))


def rows(table: LayerTable) -> np.ndarray:
    return np.stack([getattr(table, field.name) for field in fields(LayerTable)], axis=1)


PLANS = st.lists(
    st.tuples(st.integers(1, 12), st.integers(1, 6), st.integers(1, 32), st.integers(1, 32)),
    min_size=1,
    max_size=6,
)


@settings(max_examples=50, deadline=None)
@given(PLANS)
def test_plans_as_arrays_equal_the_graphs_they_make(plans: list[tuple[int, int, int, int]]) -> None:
    graph = network()
    a, b, weight, act = np.array(plans).T
    table = LayerTable.of_plans(
        graph, sizes={"a": a, "b": b}, weight_bits={"g": weight, "fc": weight}, act_bits={"g": act, "fc": act}
    )
    made = [
        graph.with_channels({"a": p[0], "b": p[1]}).with_bits({"g": Bits(p[2], p[3]), "fc": Bits(p[2], p[3])})
        for p in plans
    ]
    expected = LayerTable.of([layer for plan in made for layer in plan.layers])
    np.testing.assert_array_equal(rows(table), rows(expected))


def test_a_plan_that_names_nothing_is_the_graph_itself() -> None:
    graph = network()
    np.testing.assert_array_equal(rows(LayerTable.of_plans(graph)), rows(LayerTable.of(graph.layers)))


def test_groups_that_are_not_named_keep_their_size() -> None:
    graph = network()
    table = LayerTable.of_plans(graph, sizes={"a": np.array([5])})
    expected = LayerTable.of(graph.with_channels({"a": 5}).layers)
    np.testing.assert_array_equal(rows(table), rows(expected))


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 12), st.integers(1, 6))
def test_macs_and_weights_equal_those_of_the_layers(a: int, b: int) -> None:
    layers = network().with_channels({"a": a, "b": b}).layers
    table = LayerTable.of(layers)
    assert table.macs.tolist() == [layer.macs for layer in layers]
    assert table.kernel_weights.tolist() == [layer.kernel_weights for layer in layers]
    assert table.depthwise.tolist() == [layer.is_depthwise for layer in layers]


def test_a_later_call_of_a_reused_module_owns_no_weights_and_takes_the_bits_of_the_first() -> None:
    graph = network()
    table = LayerTable.of_plans(graph, weight_bits={"fc": np.array([4])})
    assert table.owns_weights.tolist() == [1] * 6 + [0]
    assert table.weight_bits.tolist() == [32] * 5 + [4, 4]


def test_an_empty_network_is_an_empty_table() -> None:
    assert len(LayerTable.of(())) == 0
    assert len(LayerTable.of([replace(network().layers[0], name="x")])) == 1
