"""Cellular network: the dynamics compute what layers compute, and the cost follows them."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.signal import correlate2d

from autocompress.core import Bits, ChannelGroup, LayerGraph, LayerSpec, Width
from autocompress.hardware_sim import LayerTable, UnsupportedLayerError
from autocompress.hardware_sim.cenn import (
    CellularNetwork,
    energy_delay_product,
    larger,
    rectify,
    saturate,
    settle,
    settling_time_ns,
)
from autocompress.hardware_sim.target_file import bundled_targets, load_target
from autocompress.testing import check_cost_model


def network(width: int, size: int = 20, bits: int = 4, kernel: int = 5) -> LayerGraph:
    channels, free = Width(terms=(("a", 1),)), width
    hw = {"in_hw": (size, size), "out_hw": (size, size), "bits": Bits(bits, bits)}
    layers = (
        LayerSpec("a", "conv", 3, free, (kernel, kernel), in_width=Width(3), out_width=channels, **hw),
        LayerSpec("b", "conv", free, 6, (3, 3), in_width=channels, out_width=Width(6), **hw),
        LayerSpec("c", "linear", 6, 10, in_width=Width(6), out_width=Width(10), bits=Bits(bits, bits)),
    )
    return LayerGraph(layers, (ChannelGroup("a", free, ("a",), ("b",)),), input_shape=(3, size, size))


def analogue_only(**changes: float) -> CellularNetwork:
    """One array of 64 x 64 cells whose settling is all that costs."""
    model = CellularNetwork("bare", 64, 64, 1, 10.0, 0.0, 20.0, 0.0, 0.0, 1.0, 8)
    return replace(model, **changes)


def test_after_seven_time_constants_the_cells_hold_the_convolution_to_e_to_the_minus_seven() -> None:
    rng = np.random.default_rng(0)
    inputs, template, bias = rng.uniform(-1, 1, (12, 17)), rng.normal(size=(3, 3)), 0.3
    exact = correlate2d(inputs, template, mode="same") + bias
    error = np.abs(settle(inputs, template, bias, num_tau=7.0) - exact).max() / np.abs(exact).max()
    assert 0 < error <= 9.1e-4
    # Euler with steps of 0.01 decays by 0.99 a step.
    assert error == pytest.approx(0.99**700, rel=1e-6)


@given(st.floats(-3, 2))
def test_one_saturation_rectifies(value: float) -> None:
    assert rectify(np.array(value)) == pytest.approx(max(value, 0.0), abs=1e-15)


@given(st.floats(-1, 1), st.floats(-1, 1))
def test_saturations_compose_to_a_maximum(first: float, second: float) -> None:
    assert larger(np.array(first), np.array(second)) == pytest.approx(max(first, second), abs=1e-15)


def test_three_maxima_pool_two_by_two() -> None:
    values = np.random.default_rng(0).uniform(-1, 1, (6, 8))
    a, b, c, d = values[::2, ::2], values[::2, 1::2], values[1::2, ::2], values[1::2, 1::2]
    expected = values.reshape(3, 2, 4, 2).max(axis=(1, 3))
    assert np.allclose(larger(larger(a, b), larger(c, d)), expected, atol=1e-15)


def test_outputs_saturate_at_one() -> None:
    assert saturate(np.array([-2.0, -1.0, 0.25, 1.0, 5.0])).tolist() == [-1.0, -1.0, 0.25, 1.0, 1.0]


@pytest.mark.parametrize(("bits", "taus"), [(4, 3.47), (8, 6.24)])
def test_settling_takes_the_logarithm_of_the_resolution(bits: int, taus: float) -> None:
    time = float(settling_time_ns(1.0, np.array(bits)))
    assert time == pytest.approx(taus, abs=0.005)
    assert math.exp(-time) == pytest.approx(0.5 / 2**bits)  # half a step is left


def test_latency_and_energy_of_one_layer_follow_the_formula() -> None:
    layer = LayerSpec("a", "conv", 3, 5, (5, 5), in_hw=(70, 9), out_hw=(66, 5), bits=Bits(4, 4))
    cost = analogue_only()(LayerGraph((layer,)))
    operations = 3 * 5 * (2 * 2) * (2 * 1)  # channel pairs, 3x3 parts of 5x5, tiles of 64x64
    time_ns = operations * 10.0 * 5 * math.log(2)
    assert cost["latency_ms"] == pytest.approx(time_ns * 1e-6)
    assert cost["energy_mj"] == pytest.approx(time_ns * 1e-9 * 20e-6 * 64 * 64 * 1e3)


def test_at_constant_power_the_energy_delay_product_grows_with_the_square_of_time() -> None:
    graph = LayerGraph(network(8).layers[:2])
    once, twice = (energy_delay_product(analogue_only(tau_ns=tau)(graph)) for tau in (10.0, 20.0))
    assert twice == pytest.approx(4 * once)
    power_mw = 64 * 64 * 20e-3
    cost = analogue_only()(graph)
    assert energy_delay_product(cost) == pytest.approx(power_mw * 1e-3 * cost["latency_ms"] ** 2)


def test_the_bundled_target_keeps_the_laws_of_a_cost_model() -> None:
    check_cost_model(load_target("cenn-illustrative"), network(8))


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 40), st.integers(4, 80), st.integers(2, 8), st.sampled_from([1, 3, 5, 7]))
def test_fewer_channels_bits_or_pixels_never_cost_more(width: int, size: int, bits: int, kernel: int) -> None:
    model = load_target("cenn-illustrative")
    large = model(network(width, size, bits, kernel))
    for graph in (
        network(width - 1, size, bits, kernel),
        network(width, size - 1, bits, kernel),
        network(width, size, bits - 1, kernel),
    ):
        cost = model(graph)
        assert all(cost[metric] <= large[metric] * (1 + 1e-12) for metric in model.metrics)


def test_components_and_layers_sum_to_the_total() -> None:
    model, graph = load_target("cenn-illustrative"), network(8)
    costs, cost = model.layer_costs(LayerTable.of(graph.layers)), model(graph)
    assert set(costs.energy_pj) == {"cells", "adc", "mac", "memory"}
    assert sum(part.sum() for part in costs.energy_pj.values()) * 1e-9 == pytest.approx(cost["energy_mj"])
    assert sum(layer["latency_ms"] for layer in cost.layers.values()) == pytest.approx(cost["latency_ms"])


def test_a_batch_saves_template_loads_only() -> None:
    graph = network(8)
    one, many = (load_target("cenn-illustrative", batch=n)(graph) for n in (1, 1000))
    weights = (
        load_target("cenn-illustrative").layer_costs(LayerTable.of(graph.layers)).energy_pj["memory"].sum()
    )
    assert many["latency_ms"] == one["latency_ms"]
    assert one["energy_mj"] - weights * 1e-9 < many["energy_mj"] < one["energy_mj"]


def test_plans_priced_together_cost_what_each_costs_alone() -> None:
    graph, model = network(8), load_target("cenn-illustrative")
    many = model.price_plans(graph, sizes={"a": np.array([1, 5, 8])})
    alone = [model(graph.with_channels({"a": size})) for size in (1, 5, 8)]
    for metric in model.metrics:
        assert many[metric].tolist() == pytest.approx([cost[metric] for cost in alone])


def test_every_layer_the_circuit_cannot_run_is_named() -> None:
    first, second, third = network(8).layers
    layers = (replace(first, bits=Bits()), replace(second, transposed=True), third)
    with pytest.raises(UnsupportedLayerError) as caught:
        load_target("cenn-illustrative")(LayerGraph(layers))
    text = str(caught.value)
    assert "layers a: weights" in text
    assert "layers a: activations" in text
    assert "layers b: transposed" in text


def test_every_constant_of_the_preset_says_it_is_illustrative() -> None:
    (path,) = [path for path in bundled_targets() if path.stem == "cenn-illustrative"]
    text = path.read_text()
    assert text.count("source:") == text.count("unverified: illustrative") == 10
    assert "ILLUSTRATIVE" in text
