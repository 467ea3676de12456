"""FINN's folding files: nodes bear the names, and take the cycles, that FINN's own steps give them."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from digit_networks import SHAPE, digit_images, digits_vgg, quantised
from networks import TinyMobileNet, TinyResNet, seeded
from onnx import numpy_helper
from torch import Tensor, nn

from autocompress.core import Bits, LayerGraph
from autocompress.core.errors import ExportError
from autocompress.export import StageFold, export_qonnx, write_finn_files
from autocompress.export.finn_folding_file import finn_faults, finn_folding
from autocompress.hardware_sim.finn_folding import stage_costs
from autocompress.hardware_sim.table import LayerTable
from autocompress.trace import trace

pytest.importorskip("qonnx", reason="the extra fpga is not installed")

GOLDEN = Path(__file__).parents[1] / "golden" / "finn_nodes.csv"


class Cnv(nn.Module):
    """Convolutions in pairs with max-pooling between, then linear layers: the shape of FINN's CNV."""

    def __init__(
        self, widths: Sequence[int], linear: Sequence[int], *, in_channels: int = 3, padding: int = 0
    ) -> None:
        super().__init__()
        body: list[nn.Module] = []
        for index, (before, after) in enumerate(pairwise((in_channels, *widths))):
            body += [nn.Conv2d(before, after, 3, padding=padding), nn.ReLU()]
            body += [nn.MaxPool2d(2)] if index in (1, 3) else []
        self.features = nn.Sequential(*body)
        flat = widths[-1] * (64 if padding else 1)
        head = [m for pair in pairwise((flat, *linear)) for m in (nn.Linear(*pair), nn.ReLU())]
        self.classifier = nn.Sequential(*head, nn.Linear(linear[-1], 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))


NETWORKS: dict[str, tuple[Any, tuple[int, int, int], tuple[Bits, ...]]] = {
    "cnv": (
        lambda: Cnv((64, 64, 128, 128, 256, 256), (512, 512)),
        (3, 32, 32),
        (Bits(2, 8), *(Bits(1, 2),) * 3, *(Bits(2, 2),) * 5),
    ),
    "padded": (
        lambda: Cnv((16, 16, 32, 32), (32,), in_channels=1, padding=1),
        (1, 32, 32),
        (Bits(4, 8), *(Bits(4, 4),) * 5),
    ),
}


def _golden(network: str) -> dict[str, dict[str, int]]:
    lines = [line for line in GOLDEN.read_text().splitlines() if not line.startswith("#")]
    return {
        row["node"]: {k: int(row[k] or 0) for k in ("pe", "simd", "cycles", "bram18s")}
        for row in csv.DictReader(lines)
        if row["network"] == network
    }


def _matrix_units(golden: dict[str, dict[str, int]]) -> list[dict[str, int]]:
    return [row for node, row in golden.items() if node.startswith("MVAU")]


@pytest.fixture(scope="module", params=NETWORKS)
def built(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, LayerGraph]:
    make, shape, bits = NETWORKS[request.param]
    model = seeded(make)
    images = torch.randn(8, *shape, generator=torch.Generator().manual_seed(0))
    net, plan = quantised(model, images, bits, weight_range="max", act_range="max")
    path = export_qonnx(net, tmp_path_factory.mktemp(request.param) / "m.onnx", input_shape=shape)
    return request.param, path, plan.apply(trace(model, shape).graph)


def _folds(graph: LayerGraph, rows: Sequence[dict[str, int]]) -> dict[str, StageFold]:
    table = LayerTable.of(graph.layers)
    pe, simd = (np.array([[row[name]] for row in rows]) for name in ("pe", "simd"))
    costs = stage_costs(table, pe, simd, multipliers="lut")
    columns = [np.asarray(c).ravel() for c in (costs.cycles, costs.luts, costs.brams, costs.dsps)]
    return {
        layer.name: StageFold(row["pe"], row["simd"], int(cycles), float(luts), float(brams), float(dsps))
        for layer, row, cycles, luts, brams, dsps in zip(graph.layers, rows, *columns, strict=True)
    }


def test_nodes_are_named_and_folded_as_finn_builds_them(built: tuple[str, Path, LayerGraph]) -> None:
    network, path, graph = built
    golden = _golden(network)
    folds = _folds(graph, _matrix_units(golden))
    config = finn_folding(path, folds, interval_cycles=max(fold.cycles for fold in folds.values()))
    assert list(config) == ["Defaults", *golden]  # FINN's order, too
    for node, row in golden.items():
        assert config[node]["SIMD"] == row["simd"]
        assert config[node].get("PE", 0) == row["pe"]


def test_estimates_are_those_of_finn_for_the_same_folding(built: tuple[str, Path, LayerGraph]) -> None:
    network, _, graph = built
    golden = _golden(network)
    folds = list(_folds(graph, _matrix_units(golden)).values())
    windows = [row for node, row in golden.items() if node.startswith("ConvolutionInputGenerator")]
    linear = [{"cycles": 0, "bram18s": 0}] * (len(folds) - len(windows))
    for fold, window, matrix in zip(folds, [*windows, *linear], _matrix_units(golden), strict=True):
        assert fold.cycles == max(window["cycles"], matrix["cycles"])
        assert fold.brams == window["bram18s"] + matrix["bram18s"]


def test_files_hold_folding_styles_and_estimates(built: tuple[str, Path, LayerGraph], tmp_path: Path) -> None:
    network, path, graph = built
    folds = _folds(graph, _matrix_units(_golden(network)))
    files = write_finn_files(tmp_path, path, folds, clock_mhz=100.0, multipliers="dsp")
    assert [file.name for file in files] == ["folding.json", "specialize_layers.json", "estimate.json"]
    folding, styles, estimate = (json.loads(file.read_text()) for file in files)
    assert folding["MVAU_hls_0"]["resType"] == "dsp"
    # Every folded node is forced into the implementation whose name the folding uses.
    for name in folding.keys() - {"Defaults"}:
        kind, style, number = name.rsplit("_", 2)
        assert styles[f"{kind}_{number}"] == {"preferred_impl_style": style}
    slowest = max(fold.cycles for fold in folds.values())
    assert estimate["cycles_per_image"] == slowest
    assert estimate["images_per_s"] == pytest.approx(100e6 / slowest)
    for resource in ("luts", "brams", "dsps"):
        assert estimate[resource] == sum(getattr(fold, resource) for fold in folds.values())
    assert estimate["not_built_by_default_steps"] == []
    assert estimate["layers"].keys() == folds.keys()


def test_padding_units_keep_up_with_the_slowest_stage(built: tuple[str, Path, LayerGraph]) -> None:
    network, path, graph = built
    golden = _golden(network)
    folds = _folds(graph, _matrix_units(golden))
    padded = [layer for layer in graph.layers if layer.kind == "conv" and network == "padded"]
    for interval in (2000, 20_000):
        config = finn_folding(path, folds, interval_cycles=interval)
        units = [values for node, values in config.items() if node.startswith("FMPadding")]
        assert len(units) == len(padded)
        for layer, unit in zip(padded, units, strict=True):
            pixels = (layer.in_hw[0] + 2) * (layer.in_hw[1] + 2)
            assert layer.in_channels % unit["SIMD"] == 0
            assert pixels * layer.in_channels // unit["SIMD"] <= interval


def test_foldings_that_do_not_fit_the_network_are_all_named(built: tuple[str, Path, LayerGraph]) -> None:
    network, path, graph = built
    folds = _folds(graph, _matrix_units(_golden(network)))
    first, second, *_ = folds
    wrong = {name: fold for name, fold in folds.items() if name != first}
    wrong[second] = StageFold(5, 7, 1, 0.0, 0.0, 0.0)
    wrong["nowhere"] = wrong[second]
    with pytest.raises(ExportError) as caught:
        finn_folding(path, wrong, interval_cycles=1000)
    message = str(caught.value)
    assert "layer 'features_0' has no folding" in message
    assert "no layer 'nowhere' to fold" in message
    assert "PE must divide" in message
    assert "SIMD must divide" in message


@pytest.mark.parametrize(
    ("make", "operators"),
    [
        (TinyResNet, {"Add", "ReduceMean"}),
        (TinyMobileNet, {"Add", "ReduceMean", "depthwise"}),
    ],
)
def test_what_finn_does_not_build_by_default_is_listed(
    make: Any, operators: set[str], tmp_path: Path
) -> None:
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    net, _ = quantised(seeded(make), images, (Bits(4, 4),), weight_range="max", act_range="max")
    faults = "\n".join(finn_faults(export_qonnx(net, tmp_path / "m.onnx", input_shape=(3, 32, 32))))
    for operator in operators:
        assert operator in faults


def test_tensors_finn_refuses_are_listed(tmp_path: Path) -> None:
    images = digit_images() - 0.5
    shifted, _ = quantised(digits_vgg(), images[:64], (Bits(4, 10), Bits(4, 4)), asymmetric=True)
    faults = "\n".join(finn_faults(export_qonnx(shifted, tmp_path / "a.onnx", input_shape=SHAPE)))
    for words in (
        "zero points are refused",
        "activations have at most 8 bits",
        "GlobalAveragePool has no unit",
    ):
        assert words in faults
    signs, _ = quantised(digits_vgg(), images[:64], (Bits(1, 1),))
    path = export_qonnx(signs, tmp_path / "b.onnx", input_shape=SHAPE)
    assert "binary activations must be -1 and 1" in "\n".join(finn_faults(path))


def test_pooling_that_overlaps_is_listed(built: tuple[str, Path, LayerGraph], tmp_path: Path) -> None:
    proto = onnx.load(built[1])
    pool = next(node for node in proto.graph.node if node.op_type == "MaxPool")
    next(a for a in pool.attribute if a.name == "strides").ints[:] = [1, 1]
    onnx.save(proto, tmp_path / "altered.onnx")
    assert [fault.split(":")[0] for fault in finn_faults(tmp_path / "altered.onnx")] == [pool.name]


def test_layers_and_quantisers_meet_finns_conditions(built: tuple[str, Path, LayerGraph]) -> None:
    """FINN takes unsigned quantisers behind a ReLU only, and biases as constants only."""
    graph = onnx.load(built[1]).graph
    fixed = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    makers = {output: node.op_type for node in graph.node for output in node.output}
    for node in graph.node:
        if node.op_type == "Quant" and node.input[0] not in fixed:
            signed = next(a.i for a in node.attribute if a.name == "signed")
            assert signed or makers[node.input[0]] == "Relu"
        if node.op_type in ("Conv", "Gemm"):
            assert node.input[2] in fixed
