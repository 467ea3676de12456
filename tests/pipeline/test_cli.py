"""The command line: bad input ends with code 2, one clear message, no traceback, nothing half-written."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import command
from safetensors.torch import save_file

from autocompress.pipeline import Recipe, bundled_recipes
from autocompress.pipeline.run_directory import RunDirectory
from autocompress.zoo import build

BASE = """
model: digits_vgg
data: digits
threads: 1
budgets: {macs: 0.5}
train: {epochs: 1}
search: {num_plans: 2, algorithm: random, baselines: []}
"""


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good.yaml").write_text(BASE)
    return tmp_path


def nan_weights(path: Path) -> None:
    state = build("digits_vgg", num_classes=10, in_channels=1).state_dict()
    first = next(iter(state))
    save_file({k: v * float("nan") if k == first else v for k, v in state.items()}, path)


def unsafe(path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (print, ("executed",))

    torch.save({"weight": Evil()}, path)


def truncated(path: Path) -> None:
    save_file(build("digits_vgg", num_classes=10, in_channels=1).state_dict(), path)
    path.write_bytes(path.read_bytes()[:5000])


def cifar(folder: Path) -> None:
    rng = np.random.default_rng(0)
    parts = {}
    for split, count in (("train", 60), ("test", 20)):
        parts[f"x_{split}"] = rng.integers(0, 255, (count, 32, 32, 3), dtype=np.uint8)
        parts[f"y_{split}"] = np.arange(count) % 10
    np.savez(folder / "cifar10.npz", **parts)


WEIGHTS = {"nan.safetensors": nan_weights, "evil.pth": unsafe, "short.safetensors": truncated}


@pytest.mark.parametrize(
    ("overrides", "messages"),
    [
        (["serch.num_plans=3"], ["serch", "did you mean 'search'"]),
        (["search.num_plan=3", "prune.min_keep=20"], ["did you mean 'num_plans'", "prune.min_keep", "20"]),
        (["search.num_plans=many"], ["search.num_plans", "many"]),
        (["search.algorithm=dpdg"], ["did you mean 'ddpg'"]),
        (["search.settings={sigmma: 1}"], ["sigmma"]),
        (["budgets={macs: 0.001}"], ["smallest reachable macs is", "Raise the limit"]),
        (["budgets={latency_ms: 0.5}"], ["nothing gives latency_ms; set target to a machine"]),
        (["target=bismo", "budgets={luts: 9}"], ["no target 'bismo'; did you mean"]),
        (
            ["target=bitfusion"],
            ["target bitfusion cannot run", "features.0", "set bits: {weight: 8, act: 8}"],
        ),
        (
            ["target=bitfusion", "bits={weight: 8, act: 8}", "reference_bits=32", "budgets={energy_mj: 0.5}"],
            ["target bitfusion cannot run", "set reference_bits: 8"],
        ),
        (
            ["target=xeon-amx", "budgets={latency_ms: 1e-3}"],
            ["smallest reachable latency_ms is", "held up by", "features.0"],
        ),
        (["data={name: cifar10, root: nowhere}"], ["nowhere", "cifar10.npz"]),
        (["data=digitz"], ["did you mean", "digits"]),
        (["model=vgg61"], ["vgg61", "did you mean"]),
        (["model=vgg16"], ["vgg16", "8"]),
        (["model=networks:scaled", "data={name: cifar10, root: images}"], ["networks:scaled", "3x32x32"]),
        (["model=networks:scaled"], ["nothing in this network can be pruned", "'scale'"]),
        (["weights=nan.safetensors"], ["not finite"]),
        (["weights=evil.pth"], ["evil.pth"]),
        (["weights=short.safetensors"], ["short.safetensors"]),
        (["weights=missing.pth"], ["missing.pth"]),
        (["prune.keep=[nope*]"], ["nope*", "match no layer"]),
        (["search={algorithm: ddpg, num_plans: 1}"], ["ddpg needs at least 2", "got 1"]),
        (["search.baselines=[greedy]"], ["greedy needs at least 7 for 5 knobs"]),
        (["export.opset=99"], ["opset must be between"]),
        (["export.parity_images=1"], ["export.parity_images"]),
        (["device=cuda"], ["cuda is not available"]),
    ],
)
def test_bad_input_ends_with_code_2_one_message_and_no_folder(
    work: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], messages: list[str]
) -> None:
    if overrides == ["device=cuda"] and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    (work / "images").mkdir()
    cifar(work / "images")
    for name, write in WEIGHTS.items():
        write(work / name)
    words = [word for override in overrides for word in ("--set", override)]
    code, out, message = command(capsys, "run", "good.yaml", *words)
    assert code == 2
    assert message.count("error:") == 1
    assert "Traceback" not in message + out
    assert "executed" not in out
    for expected in messages:
        assert expected in message
    assert not (work / "runs").exists()


def test_a_missing_recipe_names_the_bundled_ones(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, message = command(capsys, "run", "digit")
    assert code == 2
    assert "did you mean" in message
    assert "resnet20_cifar10_50" in message


def test_a_folder_in_use_or_not_empty_is_refused(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunDirectory.create(work / "run", Recipe.load(work / "good.yaml")):
        code, _, message = command(capsys, "run", "--resume", "run")
        assert (code, "in use by another process" in message) == (2, True)
        code, _, message = command(capsys, "run", "good.yaml", "--out", "run")
        assert (code, "not empty" in message) == (2, True)
    code, _, message = command(capsys, "run", "--resume", "elsewhere")
    assert (code, "not a run directory" in message) == (2, True)
    code, _, message = command(capsys, "report", "run")
    assert (code, "has not finished" in message) == (2, True)


def test_resume_takes_nothing_else(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, message = command(capsys, "run", "good.yaml", "--resume", "run")
    assert (code, "--resume" in message) == (2, True)


def test_check_says_what_is_prunable_locked_reachable_and_how_long_it_takes(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = command(capsys, "check", "good.yaml")
    text = " ".join(out.split())
    assert code == 0
    for expected in ("locked because", "macs: from", "can be met", "one evaluation took", "estimated"):
        assert expected in text


def test_check_shows_what_can_be_reached_on_the_target(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("target=bismo-zynq7020", "bits={weight: 8, act: 8}", "budgets={latency_ms: 0.6, bitops: 0.9}")
    code, out, _ = command(capsys, "check", "good.yaml", *(w for word in words for w in ("--set", word)))
    assert code == 0
    lines = out.splitlines()
    assert any(
        re.match(r"stage prune: latency_ms on bismo-zynq7020: from [0-9.]+ \([0-9.]+%\) to [0-9.]+$", x)
        for x in lines
    )
    assert any(re.match(r"stage prune: bitops: from [0-9,]+ \([0-9.]+%\) to [0-9,]+$", x) for x in lines)
    assert any(
        re.match(r"stage prune: budget latency_ms <= [0-9.]+ \(60.0% of the original\) can be met$", x)
        for x in lines
    )


@pytest.mark.parametrize("what", ["models", "targets", "searches", "recipes", "data"])
def test_list_prints_one_name_per_line(capsys: pytest.CaptureFixture[str], what: str) -> None:
    code, out, _ = command(capsys, "list", what)
    assert code == 0
    expected = {
        "models": "resnet20",
        "targets": "macs",
        "searches": "ddpg",
        "recipes": "digits",
        "data": "cifar10",
    }
    assert any(line.split(":")[0].split()[0] == expected[what] for line in out.splitlines())


def test_run_prints_the_table_and_the_report_can_be_written_again(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = command(capsys, "run", "good.yaml", "--set", "finetune.epochs=1", "--out", "done")
    assert code == 0
    for expected in ("Test accuracy", "MACs", "Parameters", "ONNX file (bytes)", "Latency", "report.html"):
        assert expected in out
    for name in ("model.onnx", "original.onnx", "model.safetensors"):
        assert f"{name}: {(work / 'done' / name).stat().st_size:,} bytes" in out
    (work / "done" / "report.html").unlink()
    assert command(capsys, "report", "done")[0] == 0
    assert (work / "done" / "report.html").stat().st_size > 10_000


@pytest.mark.parametrize("path", bundled_recipes(), ids=lambda path: path.stem)
def test_every_shipped_recipe_is_feasible_for_its_networks(path: Path) -> None:
    from autocompress.core.errors import InfeasibleBudgetError
    from autocompress.pipeline.architectures import architectures_of, representative
    from autocompress.pipeline.costs import Costs
    from autocompress.pipeline.problems import Candidate, problems_of
    from autocompress.trace import trace
    from autocompress.training import Data

    recipe = Recipe.load(path)
    shape = (1, 8, 8) if recipe.data and recipe.data.name == "digits" else (3, 32, 32)
    candidates = []
    for name in recipe.model:
        model = build(name, num_classes=10, in_channels=shape[0])
        traced = trace(model, shape)
        candidates.append(Candidate(name, model, traced, Costs.of(recipe, traced.graph)))
    if "nas" in recipe.stages:
        blank = [(torch.zeros(shape), 0)] * 2
        found = architectures_of(recipe, Data("blank", blank, blank, blank, 10, shape))
        candidates.append(representative(found, recipe))
    for candidate in candidates:
        for problem in problems_of(candidate, recipe).values():
            smallest, largest = problem.reachable()
            assert smallest["bitops"] < largest["bitops"]
    tight = recipe.model_copy(update={"budgets": Recipe.parse("budgets: {bitops: 1e-6}").budgets})
    with pytest.raises(InfeasibleBudgetError):
        problems_of(candidate, tight)


def test_help_does_not_load_torch() -> None:
    code = (
        "import sys; sys.argv = ['autocompress', '--help']\n"
        "from autocompress import cli\n"
        "try:\n    cli.main()\nexcept SystemExit:\n    pass\n"
        "assert 'torch' not in sys.modules\n"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_importing_the_package_loads_none_of_the_heavy_doors() -> None:
    code = (
        "import sys, autocompress\nautocompress.compress\n"
        "loaded = {'stable_baselines3', 'brevitas', 'onnx', 'onnxruntime'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
