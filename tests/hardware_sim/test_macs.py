from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from autocompress.core import Bits, ChannelGroup, LayerGraph, LayerSpec, Width
from autocompress.hardware_sim import MacsModel
from autocompress.testing import check_cost_model

A, B = Width(terms=(("a", 1),)), Width(terms=(("b", 1),))


def network() -> LayerGraph:
    """Convolution, depthwise convolution used twice, convolution, linear layer; some BatchNorm."""
    a = LayerSpec("a", "conv", 3, 8, (3, 3), in_hw=(16, 16), out_hw=(16, 16), in_width=Width(3), out_width=A)
    dw = LayerSpec(
        "dw", "conv", 8, 8, (3, 3), groups=8, in_hw=(16, 16), out_hw=(16, 16), in_width=A, out_width=A
    )
    b = LayerSpec("b", "conv", 8, 12, (1, 1), (2, 2), in_hw=(16, 16), out_hw=(8, 8), bias=True)
    return LayerGraph(
        layers=(
            a,
            dw,
            replace(dw, name="dw@2", reuses="dw"),
            replace(b, in_width=A, out_width=B),
            LayerSpec("fc", "linear", 12, 10, bias=True, in_width=B, out_width=Width(10)),
        ),
        groups=(
            ChannelGroup("a", 8, producers=("a", "dw"), consumers=("b",)),
            ChannelGroup("b", 12, producers=("b",), consumers=("fc",)),
        ),
        other_params=Width(0, (("a", 4),)),
        input_shape=(3, 16, 16),
    )


def test_peak_memory_is_the_largest_input_and_output_of_one_layer() -> None:
    graph = network().with_bits({"a": Bits(8, 8), "dw": Bits(8, 4), "b": Bits(8, 32)})
    sizes = {
        "a": (3 + 8) * 256,
        "dw": (8 + 8) * 256 // 2,
        "dw@2": (8 + 8) * 256 // 2,
        "b": (8 * 256 + 12 * 64) * 4,
        "fc": (12 + 10) * 4,
    }
    cost = MacsModel()(graph)
    assert {name: layer["peak_memory_bytes"] for name, layer in cost.layers.items()} == sizes
    assert cost["peak_memory_bytes"] == max(sizes.values())


def test_the_macs_model_is_lawful() -> None:
    check_cost_model(MacsModel(), network())


@settings(max_examples=30, deadline=None)
@given(data=st.data(), num_plans=st.integers(1, 5))
def test_a_population_of_plans_costs_exactly_what_its_graphs_cost(
    data: st.DataObject, num_plans: int
) -> None:
    graph, model = network(), MacsModel()

    def drawn(low: int, high: int) -> np.ndarray:
        return np.array(data.draw(st.lists(st.integers(low, high), min_size=num_plans, max_size=num_plans)))

    sizes = {"a": drawn(1, 8), "b": drawn(1, 12)}
    weight, act = {"dw": drawn(1, 32), "b": drawn(1, 32)}, {"dw": drawn(1, 32), "b": drawn(1, 32)}
    together = model.price_plans(graph, sizes=sizes, weight_bits=weight, act_bits=act)
    graphs = [
        graph.with_channels({name: int(size[p]) for name, size in sizes.items()}).with_bits(
            {name: Bits(int(weight[name][p]), int(act[name][p])) for name in weight}
        )
        for p in range(num_plans)
    ]
    one_by_one = model.price_many(graphs)
    for metric in model.metrics:
        assert together[metric].tolist() == one_by_one[metric].tolist(), metric


def test_only_some_knobs_may_be_given() -> None:
    graph, model = network(), MacsModel()
    plans = model.price_plans(graph, sizes={"a": np.array([8, 4])})
    assert plans["params"].tolist() == [
        model(graph)["params"],
        model(graph.with_channels({"a": 4}))["params"],
    ]
