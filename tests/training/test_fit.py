"""Training, distillation and resume."""

from __future__ import annotations

import json
import math
import resource
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from autocompress import zoo
from autocompress.core.errors import (
    CheckpointError,
    DataError,
    DivergenceError,
    RecipeError,
    RunDirectoryError,
)
from autocompress.training import (
    Augment,
    Data,
    EpochReport,
    Images,
    TrainSettings,
    distillation_loss,
    fit,
    from_datasets,
    load_data,
)
from autocompress.training.loop import learning_rate


def _data() -> Data:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (75, 2, 6, 6), generator=generator, dtype=torch.uint8)
    labels = (pixels.float().mean((1, 2, 3)) > 127).long() + (pixels[:, 0].float().mean((1, 2)) > 127)
    images = Images(pixels, labels, mean=(0.5, 0.5), std=(0.3, 0.3), augment=Augment(pad=1))
    return from_datasets(images, images, search_size=15)


def _net(seed: int = 0, channels: int = 2) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(channels, 8, 3),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Dropout(0.3),
            nn.Flatten(),
            nn.Linear(128, 3),
        )


def _same(a: nn.Module, b: nn.Module) -> bool:
    theirs = b.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in a.state_dict().items())


def _without_time(reports: tuple[EpochReport, ...]) -> list[EpochReport]:
    return [replace(report, seconds=0.0) for report in reports]


_SETTINGS = TrainSettings(
    epochs=4, batch_size=16, lr=0.05, warmup_epochs=1, label_smoothing=0.1, clip_norm=2.0
)


class _StopError(Exception):
    pass


def _stop_after(epoch: int) -> object:
    def stop(report: EpochReport) -> None:
        if report.epoch == epoch:
            raise _StopError

    return stop


@pytest.mark.parametrize(
    "settings",
    [
        _SETTINGS,
        replace(_SETTINGS, distill_weight=0.5),
        replace(_SETTINGS, mixed_precision=True),
        replace(_SETTINGS, momentum=0.0),
    ],
    ids=["plain", "teacher", "bfloat16", "no momentum"],
)
@pytest.mark.parametrize("stop", [0, 2])
def test_an_interrupted_training_ends_with_the_bits_of_one_that_was_not(
    tmp_path: Path, settings: TrainSettings, stop: int
) -> None:
    straight, resumed, teacher = _net(), _net(), _net(9)
    reports = fit(straight, _data(), settings, seed=3, teacher=teacher)
    path = tmp_path / "training.safetensors"
    with pytest.raises(_StopError):
        fit(resumed, _data(), settings, seed=3, teacher=teacher, checkpoint=path, on_epoch=_stop_after(stop))
    torch.rand(5)  # a new process has another global generator
    again, seen = _net(7), []
    rest = fit(again, _data(), settings, seed=3, teacher=teacher, checkpoint=path, on_epoch=seen.append)
    assert _same(again, straight)
    assert not _same(again, resumed)
    assert _without_time(rest) == _without_time(reports)
    assert [report.epoch for report in seen] == list(range(stop + 1, 4))
    assert _same(teacher, _net(9))


def test_a_finished_training_is_not_repeated(tmp_path: Path) -> None:
    path = tmp_path / "training.safetensors"
    first, second = _net(), _net(1)
    reports = fit(first, _data(), _SETTINGS, seed=0, checkpoint=path)
    assert fit(second, _data(), _SETTINGS, seed=0, checkpoint=path, on_epoch=_stop_after(0)) == reports
    assert _same(first, second)


def test_training_does_not_touch_the_global_generator_or_the_modes() -> None:
    model = _net().eval()
    before = torch.get_rng_state()
    fit(model, _data(), _SETTINGS, seed=0)
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(m.training for m in model.modules())


def test_another_seed_trains_other_weights() -> None:
    one, other = _net(), _net()
    fit(one, _data(), _SETTINGS, seed=0)
    fit(other, _data(), _SETTINGS, seed=1)
    assert not _same(one, other)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"seed": 1}, "seed: 0 there, 1 here"),
        (
            {"settings": replace(_SETTINGS, lr=0.1, epochs=9)},
            "epochs: 4 there, 9 here; lr: 0.05 there, 0.1 here",
        ),
        ({"model": nn.Sequential(nn.Flatten(), nn.Linear(72, 3))}, "network: its layers differ"),
        ({"data": replace(_data(), name="other")}, "data: .*'own'.* there, .*'other'.* here"),
    ],
)
def test_a_checkpoint_of_another_training_is_refused_and_says_which(
    tmp_path: Path, change: dict[str, object], says: str
) -> None:
    path = tmp_path / "training.safetensors"
    call = {"model": _net(), "data": _data(), "settings": _SETTINGS, "seed": 0, "checkpoint": path}
    fit(**call)
    other = {**call, "model": _net(1), **change}
    before = {name: value.clone() for name, value in other["model"].state_dict().items()}
    with pytest.raises(CheckpointError, match=says):
        fit(**other)
    assert all(torch.equal(v, before[name]) for name, v in other["model"].state_dict().items())


def test_a_checkpoint_of_another_teacher_is_refused(tmp_path: Path) -> None:
    path, settings = tmp_path / "training.safetensors", replace(_SETTINGS, distill_weight=0.5)
    fit(_net(), _data(), settings, seed=0, teacher=_net(1), checkpoint=path)
    with pytest.raises(CheckpointError, match="teacher: its weights differ"):
        fit(_net(), _data(), settings, seed=0, teacher=_net(2), checkpoint=path)


def test_damaged_checkpoints_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "training.safetensors"
    fit(_net(), _data(), _SETTINGS, seed=0, checkpoint=path)
    whole = path.read_bytes()
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    path.write_bytes(whole[:-10])
    with pytest.raises(CheckpointError, match="truncated"):
        fit(_net(), _data(), _SETTINGS, seed=0, checkpoint=path)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="not a training checkpoint"):
        fit(_net(), _data(), _SETTINGS, seed=0, checkpoint=path)
    save_file({k: v for k, v in tensors.items() if k != "momentum.0.bias"}, path, metadata)
    with pytest.raises(CheckpointError, match=r"lacks or alters momentum\.0\.bias"):
        fit(_net(), _data(), _SETTINGS, seed=0, checkpoint=path)


def test_a_disk_that_fills_up_keeps_the_previous_epoch(tmp_path: Path) -> None:
    path, limits = tmp_path / "training.safetensors", resource.getrlimit(resource.RLIMIT_FSIZE)
    straight = _net()
    fit(straight, _data(), _SETTINGS, seed=0)

    def fill(report: EpochReport) -> None:
        if report.epoch == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))

    try:
        with pytest.raises(RunDirectoryError, match="Free some space"):
            fit(_net(), _data(), _SETTINGS, seed=0, checkpoint=path, on_epoch=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    with safe_open(path, framework="pt") as file:
        (header,) = (json.loads(text) for text in file.metadata().values())
    assert len(header["reports"]) == 2
    resumed = _net()
    fit(resumed, _data(), _SETTINGS, seed=0, checkpoint=path)
    assert _same(resumed, straight)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_one_step_is_that_of_nesterov_sgd_without_decay_on_biases_and_norms() -> None:
    data, model, mine = _data(), _net(), _net()
    for net in (model, mine):
        net[3].p = 0.0
    train = replace(data.train.augment, pad=0, flip=False)
    plain = data.train.take(torch.arange(60).numpy(), augment=train)
    fit(
        model,
        replace(data, train=plain),
        TrainSettings(epochs=1, batch_size=60, lr=0.1, weight_decay=0.01),
        seed=0,
    )
    x, y = plain.batch(torch.arange(60), None)
    F.cross_entropy(mine.train()(x), y).backward()
    theirs = dict(model.named_parameters())
    for name, parameter in mine.named_parameters():
        gradient = parameter.grad + (0.01 * parameter.detach() if parameter.ndim > 1 else 0)
        # PyTorch's form of Nesterov: the first buffer is the gradient, the step gradient + momentum * buffer.
        expected = parameter.detach() - 0.1 * (gradient + 0.9 * gradient)
        assert torch.allclose(theirs[name], expected, atol=1e-6), name


class _Scaled(nn.Module):
    """Weights, and a scale per channel of the shape that quantisers have."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 2, 6, 6, generator=torch.Generator().manual_seed(0)))
        self.scale = nn.Parameter(torch.full((3, 1, 1, 1), 0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Gradients without effect, so that decay alone is seen.
        return F.conv2d(x, self.weight * self.scale).flatten(1) * 1e-12


def test_decay_shrinks_weights_and_no_scales_of_channels() -> None:
    model, plain = _Scaled(), _Scaled()
    settings = TrainSettings(epochs=1, batch_size=60, lr=0.1, momentum=0.0, weight_decay=0.01)
    fit(model, _data(), settings, seed=0)
    assert torch.equal(model.scale, plain.scale)
    torch.testing.assert_close(model.weight, plain.weight * (1 - 0.1 * 0.01))


def test_the_learning_rate_rises_linearly_and_falls_as_half_a_cosine() -> None:
    settings = TrainSettings(epochs=5, lr=0.4, warmup_epochs=1)
    rates = [learning_rate(settings, step, 10) for step in range(50)]
    assert rates[:10] == pytest.approx([0.04 * (i + 1) for i in range(10)])
    assert rates[10] == pytest.approx(0.4)
    assert rates[30] == pytest.approx(0.2)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[49] == pytest.approx(0.2 * (1 + math.cos(math.pi * 39 / 40)))
    assert learning_rate(settings, 50, 10) == pytest.approx(0, abs=1e-12)


def test_the_gradient_of_distillation_is_temperature_times_the_difference_of_probabilities() -> None:
    student = torch.randn(5, 4, requires_grad=True)
    teacher = torch.randn(5, 4)
    for temperature in (1.0, 4.0):
        (gradient,) = torch.autograd.grad(
            distillation_loss(student, teacher, temperature=temperature), student
        )
        gap = (student / temperature).softmax(1) - (teacher / temperature).softmax(1)
        assert torch.allclose(gradient, temperature * gap / 5, atol=1e-6)


def test_hot_distillation_is_regression_of_centred_logits() -> None:
    student, teacher = (torch.randn(6, 4, dtype=torch.float64) for _ in range(2))
    gap = (student - student.mean(1, keepdim=True)) - (teacher - teacher.mean(1, keepdim=True))
    expected = gap.square().sum(1).mean() / (2 * 4)  # Hinton et al., equation 4, integrated
    assert float(distillation_loss(student, teacher, temperature=1e4)) == pytest.approx(
        float(expected), rel=1e-3
    )


def test_the_loss_weighs_labels_and_teacher_as_the_formula_says() -> None:
    data, student, teacher = _data(), _net(), _net(5).eval()
    student[3].p = 0.0
    plain = data.train.take(torch.arange(60).numpy())
    x, y = plain.batch(torch.arange(60), None)
    with torch.no_grad():
        logits, target = student.train()(x), teacher(x)
    hard = F.cross_entropy(logits, y, label_smoothing=0.1)
    p, q = (target / 3).softmax(1), (logits / 3).softmax(1)
    soft = 9 * (p * (p / q).log()).sum(1).mean()
    settings = TrainSettings(
        epochs=1, batch_size=60, label_smoothing=0.1, distill_weight=0.7, distill_temperature=3.0
    )
    (report,) = fit(student, replace(data, train=plain), settings, seed=0, teacher=teacher)
    assert report.loss == pytest.approx(0.3 * float(hard) + 0.7 * float(soft), rel=1e-4)
    assert report.train_accuracy == pytest.approx(float((logits.argmax(1) == y).float().mean()))


def test_labels_do_not_matter_to_a_student_of_the_teacher_alone() -> None:
    data = _data()
    shuffled = Images(data.train.pixels, data.train.labels.roll(7), mean=data.train.mean, std=data.train.std)
    shuffled.augment = data.train.augment
    settings, one, other = replace(_SETTINGS, distill_weight=1.0), _net(), _net()
    fit(one, data, settings, seed=0, teacher=_net(5))
    fit(other, replace(data, train=shuffled), settings, seed=0, teacher=_net(5))
    assert not torch.equal(shuffled.labels, data.train.labels)
    assert _same(one, other)


def test_a_loss_that_is_not_finite_stops_with_epoch_step_and_remedy() -> None:
    with pytest.raises(DivergenceError, match=r"epoch 0, step \d+, at learning rate \S+e\+\d+; lower lr"):
        fit(_net(), _data(), TrainSettings(epochs=2, batch_size=16, lr=1e30), seed=0)


def test_data_of_other_channels_is_refused_with_both_shapes() -> None:
    with pytest.raises(DataError, match=r"input of shape \(16, 2, 6, 6\).*to have 5 channels"):
        fit(_net(channels=5), _data(), _SETTINGS, seed=0)


def test_distillation_without_a_teacher_is_refused() -> None:
    with pytest.raises(RecipeError, match="needs a teacher"):
        fit(_net(), _data(), replace(_SETTINGS, distill_weight=0.5), seed=0)


def test_all_wrong_settings_are_named_at_once() -> None:
    with pytest.raises(RecipeError) as caught:
        TrainSettings(epochs=-1, batch_size=0, lr=math.nan, distill_weight=2, clip_norm=0)
    named = [fault.split()[0] for fault in caught.value.faults]
    assert named == ["epochs", "batch_size", "lr", "warmup_epochs", "distill_weight", "clip_norm"]


def test_no_epochs_change_nothing() -> None:
    model = _net()
    assert fit(model, _data(), TrainSettings(epochs=0), seed=0) == ()
    assert _same(model, _net())


@pytest.mark.parametrize(("name", "epochs"), [("digits_vgg", 8), ("digits_mobilenet", 15)])
def test_small_networks_learn_the_digits(name: str, epochs: int) -> None:
    data = load_data("digits")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = zoo.build(name, num_classes=10, in_channels=1)
    reports = fit(model, data, TrainSettings(epochs=epochs, batch_size=64, warmup_epochs=1), seed=0)
    assert reports[-1].search_accuracy >= 0.97
    assert reports[-1].loss < reports[0].loss / 10
