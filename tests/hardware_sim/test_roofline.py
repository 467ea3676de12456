from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from measured_devices import gpu_measured, gpu_networks, phone_blocks
from numpy.typing import NDArray

from autocompress.core import Bits, ChannelGroup, LayerGraph, LayerSpec, Width
from autocompress.hardware_sim import LayerTable
from autocompress.hardware_sim.roofline import Roofline
from autocompress.hardware_sim.target_file import TargetError, load_target, parse_target
from autocompress.testing import check_cost_model

TARGETS = ("phone-pixel1", "jetson-tx2", "titan-x-pascal")
SIMPLE = Roofline("simple", 10.0, 2.0, 5.0, 1.0, 4.0, 100.0, 20.0, fp16_speedup=2.0, int8_speedup=4.0)


def conv(
    inputs: int, outputs: int, *, kernel: int = 1, groups: int = 1, size: int = 8, bits: int = 32
) -> LayerSpec:
    return LayerSpec(
        "conv",
        "conv",
        inputs,
        outputs,
        kernel=(kernel, kernel),
        groups=groups,
        in_hw=(size, size),
        out_hw=(size, size),
        bits=Bits(bits, bits),
    )


def latency(model: Roofline, *layers: LayerSpec) -> float:
    return float(model.layer_costs(LayerTable.of(layers)).latency_ms.sum())


def batch_ms(model: Roofline, networks: list[list[LayerSpec]]) -> NDArray[np.float64]:
    return np.array([latency(model, *layers) for layers in networks]) * model.batch


def mean_error(predicted: NDArray[np.float64], measured: NDArray[np.float64]) -> float:
    return float(np.abs(predicted / measured - 1).mean())


def proportional_error(networks: list[list[LayerSpec]], measured: NDArray[np.float64]) -> float:
    """Of one rate for all MACs, the one with the least squared relative error."""
    share = np.array([sum(layer.macs for layer in net) for net in networks]) / measured
    return float(np.abs(share * share.sum() / (share**2).sum() - 1).mean())


def target(name: str, batch: int = 1) -> Roofline:
    model = load_target(name, batch=batch)
    assert isinstance(model, Roofline)
    return model


def test_a_compute_bound_layer_takes_macs_over_the_rate_plus_the_overhead() -> None:
    model = replace(SIMPLE, depthwise_gmacs_per_s=10.0, activation_gb_per_s=1e6, weight_gb_per_s=1e6)
    layer = conv(64, 64, kernel=3, size=16)
    assert latency(model, layer) == pytest.approx(64 * 64 * 9 * 256 / 10e6 + 0.1, rel=1e-12)


def test_a_memory_bound_layer_takes_its_bytes_over_the_bandwidths() -> None:
    layer = LayerSpec("fc", "linear", 4096, 1000)
    model = replace(SIMPLE, linear_gmacs_per_s=1e9)
    expected = 4 * 5096 / 1e6 + 4 * 4096 * 1000 / 4e6 + 0.1
    assert latency(model, layer) == pytest.approx(expected, rel=1e-12)
    assert model.layer_costs(LayerTable.of([layer])).memory_bound.all()


@pytest.mark.parametrize(
    ("groups", "rate"), [(64, 2.0), (16, 1 / (1 / 10 + (1 / 2 - 1 / 10) / 4)), (1, 10.0)]
)
def test_the_rate_goes_from_depthwise_to_dense_with_the_channels_per_group(groups: int, rate: float) -> None:
    costs = SIMPLE.layer_costs(LayerTable.of([conv(64, 64, kernel=3, groups=groups)]))
    assert costs.extra["compute_ms"][0] == pytest.approx(
        64 * (64 // groups) * 9 * 64 / (rate * 1e6), rel=1e-12
    )


@pytest.mark.parametrize(
    ("bits", "speedup", "value_bytes"), [(4, 4, 1), (8, 4, 1), (9, 2, 2), (16, 2, 2), (17, 1, 4)]
)
def test_bits_are_rounded_up_to_a_format(bits: int, speedup: int, value_bytes: int) -> None:
    costs = SIMPLE.layer_costs(LayerTable.of([conv(8, 8), conv(8, 8, bits=bits)]))
    assert costs.extra["compute_ms"][0] / costs.extra["compute_ms"][1] == pytest.approx(speedup)
    assert costs.extra["weight_bytes"][1] == 64 * value_bytes


def test_the_wider_side_decides_the_format() -> None:
    layers = [
        replace(conv(8, 8), bits=Bits(4, 16)),
        replace(conv(8, 8), bits=Bits(16, 4)),
        conv(8, 8, bits=16),
    ]
    costs = SIMPLE.layer_costs(LayerTable.of(layers))
    assert len(set(costs.latency_ms.tolist())) == 1


def test_a_batch_reads_weights_and_starts_layers_once() -> None:
    layer = LayerSpec("fc", "linear", 512, 512)
    one, eight = SIMPLE, replace(SIMPLE, batch=8)
    bytes_of = [float(m.layer_costs(LayerTable.of([layer])).extra["weight_bytes"][0]) for m in (one, eight)]
    assert bytes_of[0] == 8 * bytes_of[1] == 4 * 512 * 512
    assert latency(eight, layer) * 8 >= latency(one, layer) > latency(eight, layer)


def test_energy_is_arithmetic_plus_traffic_plus_static_power() -> None:
    model = replace(SIMPLE, static_w=3.0)
    costs = model.layer_costs(LayerTable.of([conv(8, 16, bits=8)]))
    assert costs.energy_pj["mac"][0] == pytest.approx(
        8 * 16 * 64 * (0.2 + 0.1)
    )  # Horowitz: int8 multiply, int32 add
    assert costs.energy_pj["dram"][0] == pytest.approx((24 * 64 + 128) * 8 * 20.0)
    assert costs.energy_pj["static"][0] == pytest.approx(3.0 * costs.latency_ms[0] * 1e9)


def test_the_phone_predicts_measured_blocks_better_than_macs_do() -> None:
    networks, times = phone_blocks()
    measured = np.array(times)
    predicted = batch_ms(target("phone-pixel1"), networks)
    assert mean_error(predicted, measured) < 0.10
    assert proportional_error(networks, measured) > 0.25
    assert float(np.median(np.abs(predicted / measured - 1))) < 0.06


@pytest.mark.parametrize(
    ("name", "column", "bits", "limit"),
    [
        ("jetson-tx2", "tx2_fp32_ms", Bits(), 0.10),
        ("titan-x-pascal", "titanx_fp32_ms", Bits(), 0.10),
        ("titan-x-pascal", "titanx_int8_ms", Bits(8, 8), 0.15),
    ],
)
def test_a_gpu_predicts_measured_networks_better_than_macs_do(
    name: str, column: str, bits: Bits, limit: float
) -> None:
    networks, figures = gpu_networks(bits), gpu_measured(column)
    measured = np.array([figures[network] for network in networks])
    predicted = batch_ms(target(name, batch=16), list(networks.values()))
    error = mean_error(predicted, measured)
    assert error < limit
    assert error < proportional_error(list(networks.values()), measured) / 3


def test_the_tx2_energy_is_within_10_percent_of_power_times_time_where_convolutions_dominate() -> None:
    milliseconds, watts = gpu_measured("tx2_fp32_ms"), gpu_measured("tx2_w")
    for name in ("vgg-7", "resnet-18", "cifar10"):
        costs = target("jetson-tx2", batch=16).layer_costs(LayerTable.of(gpu_networks()[name]))
        joules = 16 * sum(float(part.sum()) for part in costs.energy_pj.values()) * 1e-12
        assert joules == pytest.approx(milliseconds[name] * watts[name] * 1e-3, rel=0.10), name


@pytest.mark.parametrize("name", TARGETS)
def test_every_roofline_target_is_a_lawful_cost_model(name: str) -> None:
    check_cost_model(target(name), _network())


@st.composite
def layers(draw: st.DrawFn) -> LayerSpec:
    groups, width = draw(st.sampled_from([1, 2, 8, 16])), draw(st.integers(1, 8))
    return conv(
        groups * width,
        groups * width,
        kernel=draw(st.sampled_from([1, 3, 5])),
        groups=groups,
        size=draw(st.integers(1, 30)),
        bits=draw(st.integers(1, 31)),
    )


@settings(max_examples=40, deadline=None)
@given(base=layers(), batch=st.integers(1, 16), name=st.sampled_from(TARGETS))
def test_more_channels_bits_or_pixels_never_cost_less(base: LayerSpec, batch: int, name: str) -> None:
    model, bits, size = target(name, batch), base.bits.weight, base.in_hw[0] + 1
    larger = [
        replace(base, in_channels=base.in_channels + base.groups),
        replace(base, out_channels=base.out_channels + base.groups),
        replace(base, in_hw=(size, size), out_hw=(size, size)),
        replace(base, bits=Bits(bits + 1, bits)),
        replace(base, bits=Bits(bits, bits + 1)),
    ]
    costs = model.layer_costs(LayerTable.of([base, *larger]))
    energy = np.asarray(sum(costs.energy_pj.values()))
    assert (costs.latency_ms[1:] >= costs.latency_ms[0] * (1 - 1e-12)).all()
    assert (energy[1:] >= energy[0] * (1 - 1e-12)).all()
    assert ((costs.utilisation > 0) & (costs.utilisation <= 1)).all()


@settings(max_examples=20, deadline=None)
@given(factor=st.floats(0.05, 1.0), channels=st.integers(1, 64))
def test_less_bandwidth_never_speeds_a_layer_up(factor: float, channels: int) -> None:
    layer = conv(channels, channels, kernel=3)
    for field in ("activation_gb_per_s", "weight_gb_per_s"):
        slower = replace(SIMPLE, **{field: getattr(SIMPLE, field) * factor})
        assert latency(slower, layer) >= latency(SIMPLE, layer)


def test_impossible_constants_are_reported_together() -> None:
    constants = {
        "dense_gmacs_per_s": 1.0,
        "depthwise_gmacs_per_s": 2.0,
        "linear_gmacs_per_s": 1.0,
        "activation_gb_per_s": 1.0,
        "weight_gb_per_s": 1.0,
        "overhead_us": 1.0,
        "dram_pj_per_bit": 20.0,
        "fp16_speedup": 3.0,
        "int8_speedup": 2.0,
    }
    data = {
        "name": "wrong",
        "model": "roofline",
        "about": "a machine that cannot be",
        "constants": {key: {"value": value, "source": "none"} for key, value in constants.items()},
    }
    with pytest.raises(
        TargetError, match=r"fp16_speedup <= int8_speedup.*depthwise_gmacs_per_s must be at most"
    ):
        parse_target(data, source="wrong.yaml")


def _network() -> LayerGraph:
    first, second = Width(terms=(("a", 1),)), Width(terms=(("b", 1),))
    return LayerGraph(
        layers=(
            replace(conv(3, 16, kernel=3), name="a", in_width=Width(3), out_width=first),
            replace(conv(16, 16, kernel=3, groups=16), name="dw", in_width=first, out_width=first),
            replace(conv(16, 24), name="b", in_width=first, out_width=second),
            LayerSpec("fc", "linear", 24, 10, in_width=second, out_width=Width(10)),
        ),
        groups=(
            ChannelGroup("a", 16, producers=("a",), consumers=("b",)),
            ChannelGroup("b", 24, producers=("b",), consumers=("fc",)),
        ),
        input_shape=(3, 8, 8),
    )
