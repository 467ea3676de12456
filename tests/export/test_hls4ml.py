"""hls4ml projects: the compiled C++ emulation gives Brevitas' logits, bit for bit."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from digit_networks import EXACT, MIXED, SHAPE, digit_images, digits_vgg, fitted, quantised, tiny, unseen
from hypothesis import given
from hypothesis import strategies as st
from torch import fx, nn

from autocompress.core import Bits
from autocompress.core.errors import ExportError
from autocompress.export import check_hls4ml_parity, convert_with_hls4ml, export_qonnx
from autocompress.export.hls4ml_graph import FixedPoint, narrowest

pytest.importorskip("qonnx", reason="the extra fpga is not installed")
pytest.importorskip("hls4ml", reason="the extra fpga is not installed")

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="hls4ml's emulation needs g++")


def _written(net: nn.Module, folder: Path) -> Path:
    return export_qonnx(net, folder / "m.onnx", input_shape=SHAPE)


@pytest.fixture(scope="module")
def net() -> fx.GraphModule:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = fitted(tiny(), steps=60)
    return quantised(model, digit_images()[:256], (Bits(4, 8), Bits(3, 4), Bits(5, 6)), **EXACT)[0]


@pytest.fixture(scope="module")
def project(net: fx.GraphModule, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("hls4ml")
    made = convert_with_hls4ml(_written(net, folder), folder / "project")
    made.compile()
    return made


@needs_compiler
def test_compiled_emulation_gives_brevitas_logits_on_200_real_images(
    net: fx.GraphModule, project: Any
) -> None:
    images = unseen(200)
    with torch.no_grad():
        assert check_hls4ml_parity(project, net(images), images) == 0


@needs_compiler
def test_other_logits_are_a_disagreement(net: fx.GraphModule, project: Any) -> None:
    images = unseen(20)
    with torch.no_grad():
        logits = net(images)
    with pytest.raises(ExportError, match=r"disagrees with the network for 20 of 20 images, by up to 0\.5"):
        check_hls4ml_parity(project, logits + 0.5, images)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("io_type", ["io_parallel", "io_stream"])
@pytest.mark.parametrize("bits", [MIXED, (Bits(1, 1), Bits(1, 3))], ids=["mixed", "one bit"])
def test_digits_network_gives_brevitas_logits_on_200_real_images(
    bits: tuple[Bits, ...], io_type: Any, tmp_path: Path
) -> None:
    net, _ = quantised(digits_vgg(), digit_images()[:256], bits, **EXACT)
    made = convert_with_hls4ml(_written(net, tmp_path), tmp_path / "project", io_type=io_type)
    made.compile()
    images = unseen(200)
    with torch.no_grad():
        assert check_hls4ml_parity(made, net(images), images) == 0


class _Block(nn.Module):
    """A residual addition, a depthwise and a pointwise convolution with stride, and a flatten."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1))
        self.depthwise = nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=4)
        self.pointwise = nn.Conv2d(4, 6, 1)
        self.head = nn.Linear(6 * 16, 10, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = torch.relu(x + self.body(x))
        x = torch.relu(self.pointwise(torch.relu(self.depthwise(x))))
        return self.head(x.flatten(1))


@needs_compiler
@pytest.mark.slow
def test_shortcuts_depthwise_layers_and_flatten_are_exact_too(tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = fitted(_Block(), steps=60)
    net, _ = quantised(model, digit_images()[:256], MIXED, **EXACT)
    made = convert_with_hls4ml(_written(net, tmp_path), tmp_path / "project", io_type="io_stream")
    made.compile()
    images = unseen(200)
    with torch.no_grad():
        assert check_hls4ml_parity(made, net(images), images) == 0


def test_precisions_follow_from_the_plan(net: fx.GraphModule, tmp_path: Path) -> None:
    made = convert_with_hls4ml(_written(net, tmp_path), tmp_path / "project", part="xc7z020clg400-1")
    layers = {layer.name: layer for layer in made.get_layers()}
    pixels = layers["global_in"].get_output_variable().type.precision
    assert (pixels.width, pixels.signed, str(pixels.rounding_mode)) == (8, False, "RND_CONV")
    pool = next(layer for layer in layers.values() if layer.name.startswith("GlobalAveragePool"))
    # The mean of 4 x 4 numbers of 8 bits, which averages read, needs 4 bits more to be exact.
    assert pool.get_output_variable().type.precision.width == 8 + 4
    convolutions = [layer for layer in layers.values() if layer.class_name == "Conv2D"]
    for layer, (weight, act, products) in zip(convolutions, [(4, 8, 9), (3, 4, 36)], strict=True):
        assert layer.weights["weight"].type.precision.width == weight
        # A sum of n products, and one bit for the sum with the bias, whose own width is the narrowest.
        bias = layer.weights["bias"].type.precision.width
        widest = max(weight + act + int(np.ceil(np.log2(products))), bias) + 1
        assert layer.types["accum_t"].precision.width <= widest + 8
        assert bias <= 32
    assert made.config.get_config_value("Part") == "xc7z020clg400-1"


@pytest.mark.parametrize(
    ("settings", "bits", "words"),
    [
        ({}, Bits(4, 4), "needs one power of two as its scale; quantise with power_of_two=True"),
        ({"asymmetric": True, "per_channel": False}, Bits(4, 4), "needs one power of two"),
        (EXACT, Bits(4, 32), "the images are not quantised; give the first layer activation bits"),
        (EXACT, Bits(4, 1), "binary activations with a sign; give it 2 bits"),
    ],
    ids=["float scales", "zero points", "float activations", "signs"],
)
def test_what_fixed_point_cannot_express_is_refused_by_name(
    settings: dict[str, Any], bits: Bits, words: str, tmp_path: Path
) -> None:
    net, _ = quantised(digits_vgg(), digit_images()[:64] - 0.5, (bits,), **settings)
    with pytest.raises(ExportError, match=words):
        convert_with_hls4ml(_written(net, tmp_path), tmp_path / "project")


def test_all_faults_come_at_once(tmp_path: Path) -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10)
    )
    net, _ = quantised(model.eval(), digit_images()[:64], (Bits(4, 4),))
    with pytest.raises(ExportError) as caught:
        convert_with_hls4ml(_written(net, tmp_path), tmp_path / "project")
    message = str(caught.value)
    for name in ("input_1_quant4", "_0_weight_quant", "_1_quant8", "_2_quant4", "_4_weight_quant"):
        assert f"{name}'" in message
    assert "average pooling 'GlobalAveragePool' is exact only" in message  # over 6 x 6 values


def test_files_that_are_no_graphs_and_a_missing_package_are_refused(
    net: fx.GraphModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"not a graph")
    with pytest.raises(ExportError, match="is no ONNX file"):
        convert_with_hls4ml(broken, tmp_path / "project")
    path = _written(net, tmp_path)
    monkeypatch.setitem(sys.modules, "hls4ml", None)
    with pytest.raises(ExportError, match=r"pip install 'autocompress\[fpga\]'"):
        convert_with_hls4ml(path, tmp_path / "project")


_integers = st.lists(st.integers(-(2**20), 2**20), min_size=1, max_size=8)


@given(_integers, st.integers(-30, 10))
def test_the_narrowest_type_holds_every_number_and_no_narrower_one_does(
    integers: list[int], exponent: int
) -> None:
    values = np.array(integers, dtype=np.float64) * 2.0**exponent

    def holds(grid: FixedPoint) -> bool:
        q = values / 2.0**grid.exponent
        half = 2.0 ** (grid.bits - 1)
        return bool(((q == np.round(q)) & (q >= -half) & (q < half)).all())

    grid = narrowest(values.astype(np.float32))
    assert grid is not None
    assert holds(grid)
    if values.any():
        assert not holds(FixedPoint(grid.bits - 1, grid.exponent, True))
        assert not holds(FixedPoint(grid.bits, grid.exponent + 1, True)) or grid.bits == 1


def test_numbers_beyond_32_bits_have_no_type() -> None:
    assert narrowest(np.array([1.0, 2.0**-40], np.float32)) is None
