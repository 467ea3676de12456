"""Training for a plan of bits: gradients, values, resume, and what it gives back."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from networks import TinyDenseNet, TinyMobileNet, TinyResNet, TinyVGG
from torch import Tensor, nn

from autocompress.core.errors import CheckpointError, DivergenceError
from autocompress.core.graph import Bits
from autocompress.core.plan import Plan
from autocompress.quant import Calibration, QuantSettings, QuantTables, Skeleton, quantize
from autocompress.quant.grids import Grid, asymmetric, symmetric
from autocompress.quant.qat import QatNetwork
from autocompress.quant.ste import LearnedGrid
from autocompress.training import EpochReport, TrainSettings, fit, weights_digest
from autocompress.training.data import Data, Images, from_datasets

SETTINGS = TrainSettings(epochs=3, batch_size=32, lr=0.02, weight_decay=1e-4, distill_weight=0.5)


def batches(count: int = 2, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(32, 3, 16, 16, generator=generator) for _ in range(count)]


def trained_looking(kind: type[nn.Module], seed: int = 0) -> nn.Module:
    """A network with BatchNorm statistics as of training and gains of both signs."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 0.2, 1.0)
                nn.init.normal_(module.bias)
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2.0)
    return model.eval()


def tables_of(model: nn.Module, **settings: object) -> QuantTables:
    skeleton = Skeleton(model)
    return QuantTables(skeleton, Calibration(skeleton, batches(), QuantSettings(**settings)))


def uniform(tables: QuantTables, bits: int) -> Plan:
    return Plan(bits=dict.fromkeys(tables.skeleton.layers, Bits(bits, bits)))


def small_data() -> Data:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(128, 3, 16, 16, generator=generator)
    labels = (pixels.mean((2, 3)).argmax(dim=1) + 3 * (pixels[:, 0, 0, 0] > 0)).long()
    images = Images(pixels, labels)
    return from_datasets(images, images, search_size=32, num_classes=10)


def one_step(student: nn.Module, lr: float = 0.05, seed: int = 5) -> None:
    x = batches(1, seed)[0]
    optimizer = torch.optim.SGD(student.parameters(), lr=lr)
    student.train()
    F.cross_entropy(student(x), torch.arange(32) % 10).backward()
    optimizer.step()
    student.eval()


# gradients


@pytest.mark.parametrize(
    ("grid", "low", "high"),
    [
        (symmetric(torch.tensor(1.5), 2, signed=False), -0.25, 1.75),
        (symmetric(torch.tensor(1.0), 3, signed=True), -1.125, 0.875),
        (symmetric(torch.tensor(0.75), 3, signed=True, narrow=True), -0.875, 0.875),
        (asymmetric(torch.tensor(-0.5), torch.tensor(1.0), 2), -0.75, 1.25),
        (symmetric(torch.tensor(0.5), 1, signed=True), -0.5, 0.5),
    ],
    ids=["unsigned", "signed", "narrow", "zero point", "binary"],
)
def test_the_gradient_is_one_where_values_round_inside_the_grid_and_zero_where_it_clips(
    grid: Grid, low: float, high: float
) -> None:
    x = torch.linspace(-3, 3, 1201)[:-1].add(0.0012).requires_grad_()
    LearnedGrid(grid, rate=1.0)(x).sum().backward()
    inside = (x.detach() > low) & (x.detach() < high)
    assert torch.equal(x.grad, inside.float())


def test_a_grid_that_does_the_work_of_a_relu_passes_no_gradient_below_zero() -> None:
    grid = LearnedGrid(symmetric(torch.tensor(1.5), 2, signed=False), rate=1.0)
    grid.rectifies = True
    x = torch.linspace(-1, 3, 400).requires_grad_()
    y = torch.linspace(-1, 3, 400).requires_grad_()
    grid(x).sum().backward()
    ours = grid.log.grad.clone()
    grid.log.grad, grid.rectifies = None, False
    grid(torch.relu(y)).sum().backward()
    assert torch.equal(x.grad, y.grad)
    assert float(ours) == pytest.approx(float(grid.log.grad), rel=1e-5)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_threshold_has_the_gradient_of_learned_step_sizes(bits: int) -> None:
    """Esser et al., equation 3: round(v) - v inside, the ends outside; times scale and rate for the log.

    What rounds to an end is inside, as in Brevitas; in the paper it is outside once it lies beyond the end.
    """
    generator = torch.Generator().manual_seed(0)
    x, upstream = (torch.randn(4, 50, generator=generator, dtype=torch.double) for _ in range(2))
    thresholds = torch.tensor([0.5, 1.0, 1.5, 3.0]).reshape(4, 1)
    for grid in (
        symmetric(thresholds, bits, signed=True, narrow=True),
        symmetric(torch.tensor(0.9), bits, signed=False),
    ):
        learned = LearnedGrid(grid, rate=0.3)
        learned(x.float()).backward(upstream.float())
        v = x / grid.scale.double()
        clipped = v.round().clamp(grid.low, grid.high)
        slope = torch.where(clipped == v.round(), clipped - v, clipped)
        each = upstream * slope * grid.scale.double() * 0.3
        expected = each.sum(dim=1) if grid.threshold.ndim else each.sum()
        torch.testing.assert_close(learned.log.grad.double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("bits", [2, 4])
def test_gradients_are_those_that_brevitas_derives(bits: int) -> None:
    """One scale per layer, so that there is no BatchNorm and both compute the same function.

    Biases are 0, for Brevitas also lets the rounding of the bias move the scales a little.
    """
    tables = tables_of(trained_looking(TinyResNet), per_channel=False, bias_correction=False)
    with torch.no_grad():
        for layer in tables.skeleton.layers.values():
            layer.bias.zero_()
    plan = uniform(tables, bits)
    student, peer = QatNetwork(tables, plan, batches()), quantize(tables, plan)
    x, y = batches(1, seed=9)[0], torch.arange(32) % 10
    for network in (student, peer.eval()):
        F.cross_entropy(network(x), y).backward()
    compared = 0
    for name, theirs in peer.named_parameters():
        owner, _, kind = name.rpartition(".")
        if kind == "value":
            place = owner.partition(".weight_quant")[0].partition(".act_quant")[0]
            layer = student.network.get_submodule(place)
            learned = layer if isinstance(layer, LearnedGrid) else layer.grid
            ours = learned.log.grad / (learned.rate * theirs.detach())  # by the chain rule
            torch.testing.assert_close(ours, theirs.grad.reshape(ours.shape), rtol=1e-3, atol=1e-5)
        else:
            layer = student.network.get_submodule(owner)
            ours = getattr(layer, kind).grad / (layer.unit if kind == "weight" else 1.0)
            torch.testing.assert_close(ours, theirs.grad, rtol=1e-3, atol=1e-5)
        compared += 1
    assert compared > 20


def test_thresholds_stay_above_zero_and_move_by_a_share_of_themselves() -> None:
    thresholds = torch.tensor([1e-4, 1.0, 50.0]).reshape(3, 1)
    learned = LearnedGrid(symmetric(thresholds, 2, signed=True), rate=1.0)
    with torch.no_grad():
        learned.log -= 0.5
    torch.testing.assert_close(learned.threshold, thresholds * math.exp(-0.5))
    with torch.no_grad():
        learned.log -= 50.0  # a step that would have made any plain threshold negative
    assert bool((learned.threshold > 0).all())


def test_power_of_two_thresholds_stay_powers_of_two() -> None:
    learned = LearnedGrid(symmetric(torch.tensor(0.7), 4, signed=True, power_of_two=True), rate=1.0)
    seen = set()
    for log in torch.linspace(-2, 2, 41):
        with torch.no_grad():
            learned.log.fill_(log)
        seen.add(math.log2(float(learned.scale.detach())))
    assert {value % 1 for value in seen} == {0.0}
    assert len(seen) == 7  # 2 / log(2) = 2.9 up and down


def test_no_threshold_decays() -> None:
    tables = tables_of(trained_looking(TinyVGG))
    for network in (QatNetwork(tables, uniform(tables, 2), batches()), quantize(tables, uniform(tables, 2))):
        before = {n: p.detach().clone() for n, p in network.named_parameters()}
        frozen = replace(SETTINGS, epochs=1, weight_decay=1e3, lr=1e-6, distill_weight=0.0)
        fit(network, small_data(), frozen, seed=0)
        moved = {
            n for n, p in network.named_parameters() if not torch.allclose(p, before[n], rtol=1e-3, atol=1e-4)
        }
        assert moved
        assert not {n for n in moved if n.endswith((".log", "scaling_impl.value", "bias"))}


# values


@pytest.mark.parametrize("kind", [TinyVGG, TinyResNet, TinyMobileNet, TinyDenseNet])
@pytest.mark.parametrize("bits", [1, 2, 3, 8])
def test_what_is_trained_has_the_values_of_its_brevitas_network(kind: type[nn.Module], bits: int) -> None:
    tables = tables_of(trained_looking(kind))
    student = QatNetwork(tables, uniform(tables, bits), batches())
    x = batches(1, seed=7)[0]
    for _ in range(2):
        with torch.no_grad():
            assert torch.equal(student(x), student.brevitas()(x))
        one_step(student)


@pytest.mark.parametrize("settings", [{"per_channel": False}, {"power_of_two": True}, {"asymmetric": True}])
def test_every_kind_of_grid_has_the_values_of_its_brevitas_network(settings: dict[str, bool]) -> None:
    tables = tables_of(trained_looking(TinyResNet), **settings)
    student = QatNetwork(tables, uniform(tables, 3), batches())
    x = batches(1, seed=7)[0]
    for _ in range(2):
        with torch.no_grad():
            assert torch.equal(student(x), student.brevitas()(x))
        one_step(student, lr=0.5)


def test_mixed_plans_with_float_parts_have_the_values_of_their_brevitas_network() -> None:
    tables = tables_of(trained_looking(TinyResNet))
    layers = list(tables.skeleton.layers)
    bits = dict.fromkeys(layers[:-1], Bits(4, 4)) | {layers[1]: Bits(32, 4), layers[2]: Bits(2, 32)}
    student = QatNetwork(tables, Plan(bits=bits), batches())
    before = weights_digest(tables.skeleton.graph_module)
    x = batches(1, seed=7)[0]
    for _ in range(2):
        with torch.no_grad():
            assert torch.equal(student(x), student.brevitas()(x))
        one_step(student)
    for layer in (layers[1], layers[-1]):  # float layers are trained too
        theirs = tables.skeleton.layers[layer].weight
        assert not torch.equal(student.network.get_submodule(layer).weight, theirs)
    assert weights_digest(tables.skeleton.graph_module) == before


@pytest.mark.parametrize("settings", [{"per_channel": False}, {"power_of_two": True}])
def test_without_batchnorm_the_values_before_training_are_those_of_the_tables(
    settings: dict[str, bool],
) -> None:
    tables = tables_of(trained_looking(TinyVGG), **settings)
    x = batches(1, seed=7)[0]
    for bits in (2, 5):
        plan = uniform(tables, bits)
        with torch.no_grad():
            assert torch.equal(QatNetwork(tables, plan, batches())(x), tables.network(plan)(x))


def test_batchnorm_comes_back_with_the_moments_of_the_float_outputs() -> None:
    """At 12 bits rounding is negligible: the training form is the float network, in both modes."""
    tables = tables_of(trained_looking(TinyResNet), act_range="max", weight_range="max")
    student = QatNetwork(tables, uniform(tables, 12), batches())
    x = torch.cat(batches())
    with torch.no_grad():
        wanted = tables.skeleton.graph_module(x)
        evaluated, trained = student(x), student.train()(x)
    size = float(wanted.std())
    # 8 bits where branches are added.
    assert float((evaluated - wanted).abs().max()) < 0.05 * size
    assert float((trained - wanted).abs().max()) < 0.05 * size


def test_gains_of_both_signs_are_folded_into_weights_and_bias() -> None:
    tables = tables_of(trained_looking(TinyVGG))
    student = QatNetwork(tables, uniform(tables, 3), batches())
    layer = student.network.get_submodule("features.2.0")
    with torch.no_grad():
        layer.norm.weight[::2] *= -1
        x = torch.randn(4, 16, 8, 8, generator=torch.Generator().manual_seed(3)).abs()
        wanted = layer.norm.eval()(F.conv2d(x, layer.grid(layer.weight), padding=1))
        weight, threshold, bias = layer.folded()
        got = F.conv2d(x, layer.grid.rounded(weight, threshold), bias, padding=1)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_layers_of_which_only_the_sign_is_read_keep_their_thresholds() -> None:
    """So that power-of-two scales stay so, with BatchNorm: no factor changes a sign."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Hardtanh(), nn.Flatten(), nn.Linear(1568, 10)
    )
    tables = tables_of(model.eval(), power_of_two=True)
    student = QatNetwork(tables, Plan(bits={"0": Bits(1, 8), "4": Bits(8, 1)}), batches())
    layer = student.network.get_submodule("0")
    with torch.no_grad():
        layer.norm.weight[::2] *= -1
        weight, threshold, bias = layer.folded()
        x = batches(1, seed=3)[0]
        wanted = layer.norm.eval()(F.conv2d(x, layer.grid(layer.weight)))
        got = F.conv2d(x, layer.grid.rounded(weight, threshold), bias)
        assert torch.equal(threshold, layer.grid.threshold)
        clear = wanted.abs() > 1e-4
        assert torch.equal(got.sign()[clear], wanted.sign()[clear])
        assert float(clear.float().mean()) > 0.99
        assert torch.equal(student(x), student.brevitas()(x))


def test_a_dead_channel_stays_dead_and_finite() -> None:
    model = trained_looking(TinyVGG)
    with torch.no_grad():
        model.features[0][0].weight[3] = 0.0
    tables = tables_of(model)
    student = QatNetwork(tables, uniform(tables, 2), batches())
    one_step(student)
    x = batches(1)[0]
    with torch.no_grad():
        assert bool(student(x).isfinite().all())
        assert torch.equal(student(x), student.brevitas()(x))


# training


class _StopError(Exception):
    pass


def _stop_after(epoch: int) -> object:
    def stop(report: EpochReport) -> None:
        if report.epoch == epoch:
            raise _StopError

    return stop


@pytest.mark.parametrize("form", ["student", "brevitas"])
@pytest.mark.parametrize("low_precision", [False, True])
def test_an_interrupted_training_ends_with_the_bits_of_one_that_was_not(
    tmp_path: Path, form: str, low_precision: bool
) -> None:
    tables = tables_of(trained_looking(TinyResNet))
    plan, data, teacher = uniform(tables, 2), small_data(), tables.skeleton.graph_module
    settings = replace(SETTINGS, mixed_precision=low_precision, lr=0.02 if form == "student" else 1e-3)

    def made() -> nn.Module:
        return QatNetwork(tables, plan, batches()) if form == "student" else quantize(tables, plan)

    straight, path = made(), tmp_path / "qat.safetensors"
    fit(straight, data, settings, seed=1, teacher=teacher)
    with pytest.raises(_StopError):
        fit(made(), data, settings, seed=1, teacher=teacher, checkpoint=path, on_epoch=_stop_after(0))
    resumed = made()
    fit(resumed, data, settings, seed=1, teacher=teacher, checkpoint=path)
    assert weights_digest(resumed) == weights_digest(straight)
    assert weights_digest(resumed) != weights_digest(made())
    x = batches(1)[0]
    with torch.no_grad():
        assert torch.equal(resumed.eval()(x), straight.eval()(x))


def test_a_checkpoint_of_other_bits_is_refused(tmp_path: Path) -> None:
    tables = tables_of(trained_looking(TinyVGG))
    path, data, settings = tmp_path / "qat.safetensors", small_data(), replace(SETTINGS, distill_weight=0.0)
    fit(QatNetwork(tables, uniform(tables, 4), batches()), data, settings, seed=0, checkpoint=path)
    bits = dict(uniform(tables, 4).bits)
    bits[next(iter(bits))] = Bits(3, 4)
    with pytest.raises(CheckpointError, match="its layers differ"):
        fit(QatNetwork(tables, Plan(bits=bits), batches()), data, settings, seed=0, checkpoint=path)


@pytest.mark.parametrize("settings", [{}, {"per_channel": False}])
def test_a_loss_that_is_not_finite_stops_the_training(settings: dict[str, bool]) -> None:
    tables = tables_of(trained_looking(TinyVGG), **settings)
    student = QatNetwork(tables, uniform(tables, 2), batches())
    with pytest.raises(DivergenceError, match="at learning rate"):
        fit(student, small_data(), replace(SETTINGS, lr=1e30), seed=0, teacher=tables.skeleton.graph_module)


def test_dead_thresholds_are_refused_by_name() -> None:
    tables = tables_of(trained_looking(TinyVGG))
    student = QatNetwork(tables, uniform(tables, 2), batches())
    with torch.no_grad():
        student.network.get_submodule("head.1").grid.log.fill_(-1e4)
    with pytest.raises(DivergenceError, match=r"head\.1\S* is 0; lower lr"):
        student.brevitas()
