from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from measured_devices import GOLDEN, phone_blocks, rows_of
from numpy.typing import NDArray

from autocompress.core import Bits, LayerGraph, LayerSpec
from autocompress.hardware_sim import LayerTable, UnsupportedLayerError
from autocompress.hardware_sim.lookup import Lookup
from autocompress.hardware_sim.lookup_table import (
    LAYER_COLUMNS,
    Regression,
    bit_table_rows,
    read_table,
)
from autocompress.hardware_sim.target_file import TargetError, load_target
from autocompress.testing import check_cost_model

HEADER = ",".join((*LAYER_COLUMNS, "latency_ms", "energy_mj"))
OWN = f"""# source: made up for this test
{HEADER}
3,16,3,1,1,8,8,8,8,0.5,0.01
16,16,3,2,16,8,8,8,8,0.25,0.02
16,10,1,1,1,1,1,8,8,0.125,0.04
"""
OWN_LAYERS = (
    LayerSpec("a", "conv", 3, 16, (3, 3), in_hw=(8, 8), out_hw=(8, 8), bits=Bits(8, 8)),
    LayerSpec("b", "conv", 16, 16, (3, 3), (2, 2), 16, in_hw=(8, 8), out_hw=(4, 4), bits=Bits(8, 8)),
    LayerSpec("c", "linear", 16, 10, bits=Bits(8, 8)),
)
# README of mit-han-lab/haq, "preserve ratio 60%"; the first layer reads the image, at 8 bits.
PUBLISHED = (
    "88 77 56 46 56 57 56 74 46 46 77 56 46 73 57 47 73 57 47 77 47 47 64 67 47 74 67 57 74 67 57 74 67 67 "
    "64 57 67 64 57 67 77 47 77 77 47 77 77 47 77 77 47 77 88"
)


@pytest.fixture
def own(tmp_path: Path) -> Path:
    path = tmp_path / "own.csv"
    path.write_text(OWN, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def haq(tmp_path_factory: pytest.TempPathFactory) -> tuple[Lookup, LayerGraph]:
    """HAQ's released table as a cost model, and the network it is of."""
    rows = rows_of("haq_cloud.csv")
    layers = [_haq_layer(row) for row in rows]
    costs = np.array([[[int(row[f"w{w}a{a}"]) for a in range(1, 9)] for w in range(1, 9)] for row in rows])
    path = tmp_path_factory.mktemp("haq") / "haq.json"
    path.write_text(json.dumps({"source": "mit-han-lab/haq", "rows": bit_table_rows(costs, layers)}))
    return Lookup("haq-cloud", str(path), measured_batch=16, units_per_ms=1 / 16, batch=16), LayerGraph(
        tuple(layers)
    )


def _haq_layer(row: dict[str, str]) -> LayerSpec:
    size, kernel, stride = int(row["in_hw"]), int(row["kernel"]), int(row["stride"])
    return LayerSpec(
        row["layer"],
        "conv" if size > 1 else "linear",
        int(row["inputs"]),
        int(row["outputs"]),
        kernel=(kernel, kernel),
        stride=(stride, stride),
        groups=int(row["groups"]),
        in_hw=(size, size),
        out_hw=(size // stride, size // stride),
    )


def _at(haq: tuple[Lookup, LayerGraph], bits: list[tuple[int, int]]) -> NDArray[np.float64]:
    """The table's own units (units_per_ms undoes the division by the batch) of each layer."""
    model, graph = haq
    chosen = {layer.name: Bits(*pair) for layer, pair in zip(graph.layers, bits, strict=True)}
    return model.layer_costs(LayerTable.of(graph.with_bits(chosen).layers)).latency_ms


def test_haq_at_8_bits_sums_to_39_624_933(haq: tuple[Lookup, LayerGraph]) -> None:
    assert _at(haq, [(8, 8)] * 53).sum() == 39_624_933


@pytest.mark.parametrize(
    ("bits", "ratio"), [(2, 0.2098), (3, 0.3065), (4, 0.4177), (5, 0.5438), (6, 0.6833), (7, 0.8353)]
)
def test_haq_ratios_with_the_first_and_last_layer_at_8_bits(
    haq: tuple[Lookup, LayerGraph], bits: int, ratio: float
) -> None:
    total = _at(haq, [(8, 8), *[(bits, bits)] * 51, (8, 8)]).sum()
    assert total / 39_624_933 == pytest.approx(ratio, abs=5e-5)
    assert bits != 2 or total == 8_312_597


def test_the_policy_published_for_60_percent_costs_0_5965(haq: tuple[Lookup, LayerGraph]) -> None:
    policy = [(int(pair[0]), int(pair[1])) for pair in PUBLISHED.split()]
    assert _at(haq, policy).sum() / 39_624_933 == pytest.approx(0.5965, abs=5e-5)


def test_haq_layer_10_is_linear_in_both_bits(haq: tuple[Lookup, LayerGraph]) -> None:
    for w in range(1, 9):
        for a in range(1, 9):
            assert _at(haq, [(w, a)] * 53)[10] == 112_896 * a + 144 * (w - 1)


def test_depthwise_layers_are_47_percent_of_haq_at_8_bits(haq: tuple[Lookup, LayerGraph]) -> None:
    depthwise = np.array([layer.is_depthwise for layer in haq[1].layers])
    assert _at(haq, [(8, 8)] * 53)[depthwise].sum() / 39_624_933 == pytest.approx(0.47, abs=0.005)


def test_the_haq_table_prices_a_population_of_plans_as_it_prices_each(haq: tuple[Lookup, LayerGraph]) -> None:
    model, graph = haq
    rng = np.random.default_rng(0)
    weight, act = ({layer.name: rng.integers(1, 9, 200) for layer in graph.layers} for _ in range(2))
    many = model.price_plans(graph, weight_bits=weight, act_bits=act)["latency_ms"]
    for plan in (0, 57, 199):
        bits = [(int(weight[n.name][plan]), int(act[n.name][plan])) for n in graph.layers]
        assert many[plan] == _at(haq, bits).sum()


def test_every_block_of_the_phone_table_is_found_and_its_layers_sum_to_the_measurement() -> None:
    model = Lookup("phone", str(GOLDEN / "proxylessnas_mobile.csv"))
    blocks, measured = phone_blocks()
    costs = model.layer_costs(LayerTable.of([layer for block in blocks for layer in block]))
    ends = np.cumsum([len(block) for block in blocks])[:-1]
    assert np.array([part.sum() for part in np.split(costs.latency_ms, ends)]) == pytest.approx(measured)
    assert (costs.extra["measured"] == 1).all()


def test_a_network_costs_the_same_alone_as_among_others() -> None:
    """The pieces of a block, cut in two networks, must not be put together again."""
    block = next(b for b in phone_blocks()[0] if len(b) == 3)
    graph = LayerGraph((*block[1:], block[0]))
    model = Lookup("phone", str(GOLDEN / "proxylessnas_mobile.csv"), missing="regress")
    alone = model(graph)["latency_ms"]
    assert model.price_many([graph] * 3)["latency_ms"].tolist() == [alone] * 3
    bits = {graph.layers[0].name: np.full(3, 32)}
    assert model.price_plans(graph, weight_bits=bits)["latency_ms"].tolist() == [alone] * 3


def test_layers_that_were_not_measured_are_named(own: Path) -> None:
    model, graph = (
        Lookup("own", str(own)),
        LayerGraph((replace(OWN_LAYERS[0], bits=Bits(8, 4)), *OWN_LAYERS[1:])),
    )
    with pytest.raises(UnsupportedLayerError, match=r"^layers a: own has no measurement"):
        model(graph)
    with pytest.raises(UnsupportedLayerError, match=r"^layers c: own has no measurement"):
        model.price_plans(LayerGraph(OWN_LAYERS), act_bits={"c": np.array([8, 4, 4])})


def test_the_regressed_table_keeps_the_laws_of_cost_models(two_layers: LayerGraph) -> None:
    model = Lookup("phone", str(GOLDEN / "proxylessnas_mobile.csv"), missing="regress")
    check_cost_model(model, two_layers)


def test_a_block_is_shared_out_by_macs() -> None:
    model = Lookup("phone", str(GOLDEN / "proxylessnas_mobile.csv"))
    block = phone_blocks()[0][10]
    shares = model.layer_costs(LayerTable.of(block)).latency_ms
    assert shares / shares.sum() == pytest.approx(
        np.array([b.macs for b in block]) / sum(b.macs for b in block)
    )


def test_own_measurements_are_given_back_exactly(own: Path) -> None:
    costs = Lookup("own", str(own)).layer_costs(LayerTable.of(OWN_LAYERS))
    assert costs.latency_ms.tolist() == [0.5, 0.25, 0.125]
    assert costs.energy_pj["measured"] * 1e-9 == pytest.approx([0.01, 0.02, 0.04])


def test_totals_are_per_sample_and_in_milliseconds(own: Path) -> None:
    model = Lookup("own", str(own), measured_batch=4, units_per_ms=1000.0, batch=4)
    cost = model(LayerGraph(OWN_LAYERS))
    assert cost["latency_ms"] == pytest.approx((0.5 + 0.25 + 0.125) / 1000 / 4)
    assert cost["energy_mj"] == pytest.approx((0.01 + 0.02 + 0.04) / 4)


def test_a_table_without_energy_gives_no_energy(tmp_path: Path) -> None:
    path = tmp_path / "latency.csv"
    path.write_text("\n".join(line.rpartition(",")[0] or line for line in OWN.splitlines()), encoding="utf-8")
    model = Lookup("own", str(path))
    assert model.metrics == ("latency_ms",)
    assert set(model(LayerGraph(OWN_LAYERS)).totals) == {"latency_ms"}


def test_layers_that_were_not_measured_are_listed(own: Path) -> None:
    missing = [
        replace(OWN_LAYERS[0], bits=Bits(8, 4)),
        OWN_LAYERS[1],
        replace(OWN_LAYERS[2], out_channels=11),
    ]
    with pytest.raises(UnsupportedLayerError, match=r"^layers 0, 2: own has no measurement of them"):
        Lookup("own", str(own)).layer_costs(LayerTable.of(missing))


def test_a_window_that_is_not_square_is_never_taken_for_a_square_one(own: Path) -> None:
    skewed = replace(OWN_LAYERS[0], kernel=(3, 1))
    with pytest.raises(UnsupportedLayerError, match="layers 0"):
        Lookup("own", str(own)).layer_costs(LayerTable.of([skewed]))


def test_very_large_layers_are_told_apart(tmp_path: Path) -> None:
    sizes = (2_000_000, 2_000_001, 3_000_000)
    rows = [f"{i},{o},1,1,1,{i},{o},32,32,{i + 2 * o}" for i in sizes for o in sizes]
    path = tmp_path / "large.csv"
    path.write_text(
        "\n".join(["# source: made up", HEADER.removesuffix(",energy_mj"), *rows]), encoding="utf-8"
    )
    layers = [LayerSpec("x", "conv", i, o, in_hw=(i, o), out_hw=(i, o)) for i in sizes for o in sizes]
    latency = Lookup("large", str(path)).layer_costs(LayerTable.of(layers)).latency_ms
    assert latency.tolist() == [i + 2 * o for i in sizes for o in sizes]


def test_another_batch_than_the_measured_one_is_an_error(own: Path) -> None:
    with pytest.raises(UnsupportedLayerError, match="measured with batch 1; ask for that, not 2"):
        Lookup("own", str(own), batch=2).layer_costs(LayerTable.of(OWN_LAYERS))


def test_regression_finds_a_power_law() -> None:
    rng = np.random.default_rng(1)
    features = rng.uniform(1, 1e6, (60, 3))
    costs = 2e-3 * features[:, 0] ** 0.7 * features[:, 2] ** 0.2
    fitted = Regression.fit(features, costs)
    assert fitted.exponents == pytest.approx((0.7, 0.0, 0.2), abs=1e-6)
    assert fitted.predict(features) == pytest.approx(costs, rel=1e-6)


def test_missing_phone_layers_are_regressed_within_15_percent_on_blocks_left_out(tmp_path: Path) -> None:
    lines = (GOLDEN / "proxylessnas_mobile.csv").read_text(encoding="utf-8").splitlines()
    kept = tmp_path / "kept.csv"
    kept.write_text(
        "\n".join(lines[:2] + [row for i, row in enumerate(lines[2:]) if i % 4]), encoding="utf-8"
    )
    blocks, measured = phone_blocks()
    model = Lookup("phone", str(kept), missing="regress")
    errors = []
    for block, time in list(zip(blocks, measured, strict=True))[::4]:
        costs = model.layer_costs(LayerTable.of(block))
        assert (costs.extra["measured"] == 0).all()
        errors.append(abs(costs.latency_ms.sum() / time - 1))
    assert float(np.median(errors)) < 0.15


@settings(max_examples=30, deadline=None)
@given(
    channels=st.integers(1, 200),
    outputs=st.integers(1, 200),
    size=st.integers(2, 60),
    bits=st.integers(1, 31),
)
def test_regressed_layers_never_cost_less_with_more_channels_bits_or_pixels(
    channels: int, outputs: int, size: int, bits: int
) -> None:
    model = Lookup("phone", str(GOLDEN / "proxylessnas_mobile.csv"), missing="regress")
    base = LayerSpec(
        "x", "conv", channels, outputs, in_hw=(size, size), out_hw=(size, size), bits=Bits(bits, bits)
    )
    larger = [
        replace(base, in_channels=channels + 1),
        replace(base, out_channels=outputs + 1),
        replace(base, in_hw=(size + 1, size), out_hw=(size + 1, size)),
        replace(base, bits=Bits(bits + 1, bits)),
        replace(base, bits=Bits(bits, bits + 1)),
    ]
    latency = model.layer_costs(LayerTable.of([base, *larger])).latency_ms
    assert (latency[1:] >= latency[0] * (1 - 1e-12)).all()


def test_every_wrong_row_is_named(tmp_path: Path) -> None:
    path = tmp_path / "wrong.csv"
    path.write_text(
        f"""# source: made up
{HEADER}
3,16,3,1,1,8,8,8,8,0.5,
3,16,3,1,1,8,8,8,8,0.6,
3,16,3,1,2,8,8,8,8,0.5,
3,16,3,1,1,8,8,33,8,0.5,
3,16,3,1,1,8,8,8,8,-1,
3.5,16,3,1,1,8,8,8,8,1,
""",
        encoding="utf-8",
    )
    with pytest.raises(ValueError, match="row") as caught:
        read_table(path)
    assert [line.removeprefix(f"{path}: ") for line in str(caught.value).splitlines()] == [
        "row 2: repeats row 1 with another measurement",
        "row 3: groups must divide 3 and 16 channels, got 2",
        "row 4: bits must be between 1 and 32, got 33 and 8",
        "row 5: latency_ms must be a number > 0, got -1",
        "row 6: in_channels must be a whole number, got 3.5",
    ]


def test_every_wrong_block_is_named(tmp_path: Path) -> None:
    path = tmp_path / "blocks.csv"
    rows = [
        "Conv,7x7x3,14x14x8,,,,1",
        "Pool,7x7x3,7x7x3,,,,1",
        "Conv,7x7,7x7x8,,,,1",
        "Conv,7xAx3,7x7x8,,,,1",
    ]
    header = "op,input,output,expand,kernel,stride,mean_ms"
    path.write_text("\n".join(["# source: made up", header, *rows]), encoding="utf-8")
    with pytest.raises(ValueError, match="row") as caught:
        read_table(path)
    assert [line.removeprefix(f"{path}: ") for line in str(caught.value).splitlines()] == [
        "row 1: output must not be larger than input, got 7x7x3 and 14x14x8",
        "row 2: op must be Conv, Conv_1, Logits or expanded_conv, got 'Pool'",
        "row 3: input and output must be HxWxC, got 7x7 and 7x7x8",
        "row 4: input must be HxWxC or C, got '7xAx3'",
    ]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.csv", OWN.replace("# source: made up for this test\n", ""), "no source"),
        ("t.csv", OWN.replace("act_bits", "activations"), "lacks the columns act_bits"),
        ("t.csv", OWN.replace(",0.02\n", ",\n"), "energy_mj must be given in all rows or in none"),
        ("t.csv", "# source: none\n" + HEADER + "\n", "has no rows"),
        ("t.json", "{", "cannot be read as JSON"),
        ("t.json", '{"source": "x", "rows": [1]}', "must be"),
        ("t.json", '{"rows": [{"in_channels": 3}]}', "no source"),
    ],
)
def test_a_wrong_table_is_an_error(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_table(tmp_path / name)


def test_a_target_file_loads_a_table_and_reports_a_wrong_one(own: Path, tmp_path: Path) -> None:
    target = tmp_path / "mine.yaml"
    text = (
        'name: mine\nmodel: lookup\nabout: my board\nconstants:\n  table: {{value: {}, source: "my bench"}}\n'
    )
    target.write_text(text.format(own), encoding="utf-8")
    assert load_target(target)(LayerGraph(OWN_LAYERS))["latency_ms"] == pytest.approx(0.875)
    target.write_text(text.format(tmp_path / "absent.csv"), encoding="utf-8")
    with pytest.raises(TargetError, match="no measurement table"):
        load_target(target)
    target.write_text(text.format(own) + '  missing: {value: guess, source: "none"}\n', encoding="utf-8")
    with pytest.raises(TargetError, match="missing must be error or regress"):
        load_target(target)


def test_a_bit_table_of_another_network_is_an_error() -> None:
    with pytest.raises(ValueError, match="for 3 layers, got shape"):
        bit_table_rows(np.ones((2, 8, 8)), OWN_LAYERS)
    with pytest.raises(ValueError, match="square windows; a have others"):
        bit_table_rows(np.ones((1, 8, 8)), [replace(OWN_LAYERS[0], kernel=(3, 1))])
