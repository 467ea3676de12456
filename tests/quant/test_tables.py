from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from networks import TinyDenseNet, TinyMobileNet, TinyPadded, TinyResNet, TinyVGG, conv_bn, seeded
from torch import Tensor, nn

from autocompress.core import Bits, Plan
from autocompress.core.errors import DataError
from autocompress.quant import Calibration, QuantSettings, QuantTables, Skeleton, quantize, tables


def images(num: int = 12, seed: int = 0) -> Tensor:
    return torch.randn(num, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


class Forks(nn.Module):
    """Concatenation, clamps of several spellings, overwritten tensors, and tensors with many readers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.six = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU6(inplace=True)
        self.a, self.b = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.c, self.tanh = nn.Conv2d(24, 8, 1), nn.Hardtanh(0.0, 0.5)
        self.deep, self.head = conv_bn(8, 8, groups=8), nn.Linear(8 * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.six(4 * self.stem(x))
        y = F.relu(self.a(x), inplace=True)
        y += x
        z = torch.cat([x, y, F.relu6(self.b(y))], 1)
        z = self.tanh(self.c(F.max_pool2d(z, 2)))
        return self.head(torch.flatten(F.max_pool2d(self.deep(z), 2), 1))


NETWORKS = (TinyVGG, TinyResNet, TinyMobileNet, TinyDenseNet, TinyPadded, Forks)
SETTINGS = {
    "symmetric": QuantSettings(),
    "asymmetric": QuantSettings(asymmetric=True),
    "powers of two": QuantSettings(power_of_two=True),
    "per tensor": QuantSettings(per_channel=False, act_range="max"),
    "fixed point": QuantSettings(per_channel=False, power_of_two=True, weight_range="percentile"),
    "uncorrected": QuantSettings(bias_correction=False, weight_range="haq", act_range="haq"),
}


def tables_of(model: nn.Module, settings: QuantSettings | None = None) -> QuantTables:
    skeleton = Skeleton(model)
    calibration = Calibration(skeleton, [images(8, 1), images(8, 2)], settings or QuantSettings())
    return QuantTables(skeleton, calibration)


def uniform(found: QuantTables, bits: Bits) -> Plan:
    return Plan(bits=dict.fromkeys(found.skeleton.layers, bits))


def random_plan(found: QuantTables, seed: int, widths: tuple[int, ...]) -> Plan:
    draw = random.Random(seed)
    return Plan(bits={n: Bits(draw.choice(widths), draw.choice(widths)) for n in found.skeleton.layers})


PAIRS = [
    # Every network and every setting once; the other pairs with the slow tests.
    pytest.param(kind, name, marks=() if row == column else pytest.mark.slow)
    for row, kind in enumerate(NETWORKS)
    for column, name in enumerate(SETTINGS)
]


@pytest.mark.parametrize(("kind", "name"), PAIRS)
@pytest.mark.filterwarnings("ignore:Computing zero point")
def test_the_fast_network_equals_the_brevitas_network_to_the_last_bit(
    kind: type[nn.Module], name: str
) -> None:
    found, x = tables_of(seeded(kind), SETTINGS[name]), images()
    mixed = tuple(range(1, 9))
    with torch.no_grad():
        for seed, widths in enumerate((mixed, (8,), (1, 2), (2, 4, 32))):
            plan = random_plan(found, seed, widths)
            expected = quantize(found, plan)(x)
            expected = getattr(expected, "value", expected)
            assert torch.equal(found.network(plan)(x), expected)
            assert torch.equal(found.network(plan, keep_inputs=True)(x), expected)


@pytest.mark.parametrize("kind", NETWORKS)
def test_the_empty_plan_is_the_float_network(kind: type[nn.Module]) -> None:
    found, x = tables_of(seeded(kind)), images()
    assert torch.equal(found.network(Plan())(x), found.skeleton.graph_module(x))
    assert torch.equal(found.network(uniform(found, Bits()))(x), found.skeleton.graph_module(x))


@pytest.mark.parametrize("kind", NETWORKS)
def test_weights_of_sixteen_bits_are_close_to_the_float_network(kind: type[nn.Module]) -> None:
    found, x = tables_of(seeded(kind), QuantSettings(weight_range="max")), images(8, 1)
    with torch.no_grad():
        exact, rounded = found.skeleton.graph_module(x), found.network(uniform(found, Bits(16, 32)))(x)
    torch.testing.assert_close(rounded, exact, rtol=0, atol=1e-4 * float(exact.max() - exact.min()))


def test_wide_grids_do_not_clip_biases() -> None:
    """A chain adds and averages nothing, so that nothing in it has fewer bits than the plan says."""
    found, x = tables_of(seeded(TinyVGG), QuantSettings(act_range="max", weight_range="max")), images(8, 1)
    with torch.no_grad():
        exact = found.skeleton.graph_module(x)
        for bits in (Bits(16, 16), Bits(8, 16), Bits(16, 12)):
            plan = uniform(found, bits)
            rounded = found.network(plan)(x)
            assert float((rounded - exact).abs().max()) < 0.01 * float(exact.max() - exact.min())
            assert torch.equal(quantize(found, plan)(x), rounded)


def test_neither_the_images_nor_the_model_are_written_to() -> None:
    model, x = seeded(Forks), images()
    kept = x.clone()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = tables_of(model)
    network = found.network(uniform(found, Bits(3, 3)))
    first = network(x)  # gradients on, as a user may call it
    assert torch.equal(network(x), first)
    assert torch.equal(x, kept)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_clamps_that_a_quantiser_repeats_are_left_out() -> None:
    def clamps(kind: type[nn.Module]) -> list[str]:
        found = tables_of(seeded(kind))
        network = found.network(uniform(found, Bits(4, 4)))
        return [n.name for n in network.graph.nodes if n.name in ("six", "tanh", "relu", "relu6")]

    assert clamps(TinyResNet) == []
    assert clamps(Forks) == ["six"]  # an addition reads it as it is


def test_weights_are_rounded_once_per_layer_and_width() -> None:
    found = tables_of(seeded(TinyVGG))
    first = found.weight("features.0.0", 4)
    assert found.weight("features.0.0", 4) is first
    assert found.weight("features.0.0", 3) is not first
    layer = found.network(uniform(found, Bits(4, 8))).get_submodule("features.0.0")
    assert layer.weight is first.values


def test_tables_forget_what_was_not_used_for_longest(monkeypatch: pytest.MonkeyPatch) -> None:
    found = tables_of(seeded(TinyVGG))
    size = found.skeleton.layers["features.0.0"].weight.nbytes
    monkeypatch.setattr(tables, "_MAX_BYTES", 2 * size)
    two, three = found.weight("features.0.0", 2), found.weight("features.0.0", 3)
    assert found.weight("features.0.0", 2) is two
    found.weight("features.0.0", 4)
    assert found.weight("features.0.0", 2) is two
    assert found.weight("features.0.0", 3) is not three


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_bias_correction_takes_away_the_mean_error_of_rounded_weights(groups: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 8, 1, groups=groups), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 4))
    x = torch.rand(64, 8, 4, 4) + 0.5
    plan = Plan(bits={"0": Bits(2, 32)})

    def shift(corrected: bool) -> float:
        skeleton, settings = Skeleton(model), QuantSettings(per_channel=False, bias_correction=corrected)
        calibration = Calibration(skeleton, [x[:40], x[40:]], settings)
        network = QuantTables(skeleton, calibration).network(plan)
        with torch.no_grad():
            error = network.get_submodule("0")(x) - model[0](x)
        return float(error.mean(dim=(0, 2, 3)).abs().max())

    assert shift(corrected=False) > 0.01
    assert shift(corrected=True) < 1e-5


def test_bias_correction_spreads_channel_means_over_flattened_features() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 4)).eval()
    x = torch.randn(32, 3, 4, 4)
    x = torch.stack([x.roll((i, j), (2, 3)) for i in range(4) for j in range(4)]).flatten(0, 1)
    skeleton = Skeleton(model)  # every position now has the channel's mean
    found = QuantTables(skeleton, Calibration(skeleton, [x], QuantSettings()))
    with torch.no_grad():
        error = found.network(Plan(bits={"3": Bits(2, 32)}))(x) - model(x)
    assert float(error.mean(dim=0).abs().max()) < 1e-5


def test_all_zero_channels_and_layers_give_finite_equal_outputs() -> None:
    model = seeded(TinyVGG)
    with torch.no_grad():
        model.features[0][0].weight[:4] = 0  # type: ignore[union-attr, index]
        model.head[1].weight.zero_()  # type: ignore[union-attr, index]
        model.head[1].bias.fill_(-1.0)  # its ReLU is always 0  # type: ignore[union-attr, index]
    found, x = tables_of(model), images()
    for bits in (Bits(1, 1), Bits(2, 2), Bits(8, 8)):
        plan = uniform(found, bits)
        with torch.no_grad():
            output = found.network(plan)(x)
            assert torch.equal(output, quantize(found, plan)(x))
        assert bool(output.isfinite().all())


def test_tensors_without_negative_values_get_unsigned_grids() -> None:
    found = tables_of(seeded(TinyVGG))
    assert found.input_grid("features.0.0", 4).signed
    assert not found.input_grid("features.2.0", 4).signed


def test_asymmetric_settings_give_a_zero_point_only_to_tensors_with_negative_values() -> None:
    found = tables_of(seeded(TinyVGG), QuantSettings(asymmetric=True))
    assert found.input_grid("features.0.0", 4).zero_point is not None
    assert found.input_grid("features.2.0", 4).zero_point is None


def test_powers_of_two_hold_for_weights_activations_and_biases() -> None:
    found = tables_of(seeded(TinyVGG), QuantSettings(power_of_two=True))
    for name in found.skeleton.layers:
        for scale in (found.weight(name, 5).grid.scale, found.input_grid(name, 5).scale):
            exponents = scale.log2()
            assert torch.equal(exponents, exponents.round())


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ([], "there are none"),
        ([torch.full((2, 3, 16, 16), 0.5)], "every value is 0.5"),
        ([torch.full((2, 3, 16, 16), float("nan"))], "not finite"),
        ([torch.full((2, 3, 16, 16), float("inf"))], "not finite"),
    ],
)
def test_unusable_calibration_images_are_refused(bad: list[Tensor], words: str) -> None:
    with pytest.raises(DataError, match=words):
        Calibration(Skeleton(seeded(TinyVGG)), bad, QuantSettings())


def test_a_diverged_network_is_refused_with_the_tensor_that_is_not_finite() -> None:
    model = seeded(TinyVGG)
    with torch.no_grad():
        model.features[2][0].weight[0, 0, 0, 0] = float("nan")  # type: ignore[union-attr, index]
    with pytest.raises(DataError, match="'features_2_2' are not finite"):
        tables_of(model)


def test_equal_images_have_equal_digests_and_others_do_not() -> None:
    skeleton = Skeleton(seeded(TinyVGG))
    one, same, other = (Calibration(skeleton, [images(4, s)], QuantSettings()).digest for s in (1, 1, 2))
    assert one == same != other


def test_zero_points_and_powers_of_two_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="exclude each other"):
        QuantSettings(asymmetric=True, power_of_two=True)


def test_widths_that_no_grid_has_are_refused() -> None:
    found = tables_of(seeded(TinyVGG))
    with pytest.raises(ValueError, match="from 1 to 16 bits, got 20"):
        found.network(uniform(found, Bits(20, 8)))
