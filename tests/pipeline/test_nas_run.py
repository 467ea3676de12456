"""Runs that find their network first: budgets of the whole chain, what is left, and what can be borrowed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from autocompress.core import Bits, Budget, Plan
from autocompress.core.errors import InfeasibleBudgetError, RecipeError
from autocompress.hardware_sim import load_target
from autocompress.nas import mbconv_chain
from autocompress.pipeline import Event, Recipe, compress, load_compressed, prepare, resume, run_recipe
from autocompress.pipeline.alone import alone_recipe
from autocompress.pipeline.architectures import Architectures, architectures_of
from autocompress.pipeline.joint import joint_architectures_of
from autocompress.training import Data, evaluate, load_data

CHAIN = """
name: chain
data: {name: digits, train_size: 256}
threads: 1
target: bismo-zynq7020
reference_bits: 8
budgets: {latency_ms: 0.25}
stages: [nas, train, prune, finetune, quantise, qat]
nas: {epochs: 2, warmup_epochs: 1, alpha_lr: 0.1, num_plans: 4, score_images: 64}
train: {epochs: 1, batch_size: 64}
prune: {round_to: 4, calibration_images: 64, recalibrate_batches: 1, score_images: 50}
search: {algorithm: random, num_plans: 3, baselines: []}
finetune: {epochs: 1, batch_size: 64}
quantise:
  weight_bits: [2, 4, 8]
  act_bits: [2, 4, 8]
  calibration_images: 64
  score_images: 50
  search: {num_plans: 3}
qat: {epochs: 1, batch_size: 64}
"""
NAS_ONLY = """
data: {name: digits, train_size: 256}
threads: 1
stages: [nas, train]
nas: {epochs: 2, alpha_lr: 0.1}
train: {epochs: 1}
"""


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "straight"
    run_recipe(Recipe.parse(CHAIN + "alone: [nas, prune, quantise]\n"), out=folder)
    return folder


def read(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text())


def test_the_network_that_is_left_is_a_member_of_the_space_within_the_budget(straight: Path) -> None:
    result = read(straight, "result.json")
    plan = Plan.from_json(json.dumps(result["plan"]))
    space, target = mbconv_chain((1, 8, 8), 10), load_target("bismo-zynq7020")
    latency = target(plan.apply(space.graph(plan.arch)))["latency_ms"]
    largest = space.graph({name: ops[-1] for name, ops in space.decisions.items()})
    eight = largest.with_bits({layer.name: Bits(8, 8) for layer in largest.layers})
    assert result["predicted"]["after"]["latency_ms"] == pytest.approx(latency, rel=1e-12)
    assert result["budgets"]["latency_ms"] == 0.25 * target(eight)["latency_ms"] >= latency
    assert result["predicted"]["original"]["latency_ms"] == target(eight)["latency_ms"]


def test_the_network_is_loaded_without_the_caller_knowing_its_architecture(straight: Path) -> None:
    result = read(straight, "result.json")
    accuracy = evaluate(load_compressed(None, straight), load_data("digits").test).accuracy
    assert accuracy == result["after"]["accuracy"]


def test_every_stage_gets_a_part_of_the_budget_and_the_last_one_what_is_left(straight: Path) -> None:
    result, found = read(straight, "result.json"), read(straight, "architecture.json")
    limits = [result["search"][stage]["budgets"]["latency_ms"] for stage in ("nas", "prune", "quantise")]
    assert limits[2] == result["budgets"]["latency_ms"]
    assert found["largest"]["latency_ms"] > limits[0] > limits[1] > limits[2]
    costs = {step["stage"]: step["latency_ms"] for step in result["chain"]}
    assert costs["train"] == found["cost"]["latency_ms"] <= limits[0]
    assert costs["prune"] == costs["finetune"] <= limits[1]
    assert costs["quantise"] == costs["qat"] <= limits[2]


def test_accuracy_is_told_after_every_stage(straight: Path) -> None:
    result = read(straight, "result.json")
    accuracy = {step["stage"]: step["accuracy"] for step in result["chain"]}
    assert list(accuracy) == ["train", "prune", "finetune", "quantise", "qat"]
    after = result["after"]
    assert result["before"]["accuracy"] == accuracy["train"]
    assert after["accuracy_before_finetune"] == accuracy["prune"]
    assert after["accuracy_before_quantise"] == accuracy["finetune"]
    assert after["accuracy_before_qat"] == accuracy["quantise"]
    assert after["accuracy"] == accuracy["qat"]


def test_a_stage_alone_is_within_the_whole_budget_or_says_why_it_cannot_be(straight: Path) -> None:
    result = read(straight, "result.json")
    assert list(result["alone"]) == ["nas", "prune", "quantise"]
    for stage, found in result["alone"].items():
        if "refused" in found:
            assert "cannot be met" in found["refused"]
        else:
            assert found["latency_ms"] <= result["budgets"]["latency_ms"]
            assert read(straight / "alone" / stage, "result.json")["after"]["accuracy"] == found["accuracy"]
    assert any("accuracy" in found for found in result["alone"].values())


def test_the_report_shows_the_chain_the_stages_alone_and_the_architecture(straight: Path) -> None:
    html = (straight / "report.html").read_text()
    found = read(straight, "architecture.json")
    assert "Stage after stage" in html
    assert "trained with rounding" in html
    assert all(f"{stage} alone" in html for stage in ("nas", "prune", "quantise"))
    assert "Taken from the 1,764 networks of the space mbconv_chain" in html
    assert all(name in html and op in html for name, op in found["arch"].items())


@pytest.mark.parametrize("stage", ["nas", pytest.param("nas evolution", marks=pytest.mark.slow)])
def test_a_run_interrupted_while_it_looks_for_a_network_ends_as_the_straight_one(
    straight: Path, tmp_path: Path, stage: str
) -> None:
    def interrupt(event: Event) -> None:
        if event.stage == stage and event.done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_recipe(Recipe.parse(CHAIN), out=tmp_path / "run", on_event=interrupt)
    resume(tmp_path / "run")
    result, other = read(straight, "result.json"), read(tmp_path / "run", "result.json")
    assert other["plan"] == result["plan"]
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "run", straight))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_another_target_costs_no_training_of_a_supernet(straight: Path, tmp_path: Path) -> None:
    stages: set[str] = set()
    recipe = Recipe.parse(
        f"{NAS_ONLY}\ntarget: bitfusion\nbits: {{weight: 8, act: 8}}\nbudgets: {{energy_mj: 0.5}}",
        overrides=[f"nas.supernet={straight}", "nas.num_plans=6"],
    )
    result = run_recipe(recipe, out=tmp_path / "run", on_event=lambda event: stages.add(event.stage))
    assert "nas evolution" in stages
    assert "nas" not in stages
    assert not (tmp_path / "run" / "nas.checkpoint").exists()
    assert result.predicted["after"]["energy_mj"] <= result.budgets["energy_mj"]


def test_python_data_get_a_network_of_their_own(tmp_path: Path) -> None:
    digits = load_data("digits", train_size=128)
    recipe = {
        "budgets": {"macs": 0.5},
        "threads": 1,
        "stages": ["nas", "train"],
        "nas": {"epochs": 1},
        "train": {"epochs": 1},
    }
    result = compress(None, digits, recipe, run_dir=tmp_path / "run")
    assert result.after["macs"] <= result.budgets["macs"]
    with pytest.raises(RecipeError, match="None where the recipe has stage nas"):
        compress(torch.nn.Identity(), digits, recipe, run_dir=tmp_path / "other")


@pytest.fixture(scope="module")
def digits() -> Data:
    return load_data("digits")


@pytest.fixture(scope="module")
def architectures(digits: Data) -> Architectures:
    return architectures_of(Recipe.parse(f"{NAS_ONLY}\nbudgets: {{macs: 0.5}}"), digits)


def test_a_distribution_within_the_budget_is_taken_as_it_is(architectures: Architectures) -> None:
    rng = np.random.default_rng(0)
    table = {name: rng.dirichlet(np.ones(len(ops))) for name, ops in architectures.space.decisions.items()}
    loose = (Budget("macs", 1e12, relative=False),)
    assert architectures.within(table, loose).arch == architectures.space.derive(table)


@pytest.mark.parametrize("seed", range(5))
def test_a_tight_budget_is_kept_and_gives_up_no_more_than_it_must(
    architectures: Architectures, seed: int
) -> None:
    problem, rng = architectures.problem, np.random.default_rng(seed)
    table = {name: rng.dirichlet(np.ones(len(ops))) for name, ops in architectures.space.decisions.items()}

    def likelihood(plan: Plan) -> float:
        ops = architectures.space.decisions
        return sum(float(np.log(table[name][ops[name].index(op)])) for name, op in plan.arch.items())

    smallest, largest = (problem.smallest["macs"], problem.largest["macs"])
    found = []
    for share in (0.0, 0.1, 0.3, 0.6, 1.0):
        budget = Budget("macs", smallest + share * (largest - smallest), relative=False)
        plan = architectures.within(table, (budget,))
        assert budget.met_by(problem.price(plan))
        found.append(likelihood(plan))
    assert found == sorted(found)


def test_a_budget_no_member_can_meet_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(InfeasibleBudgetError, match="the smallest reachable macs"):
        run_recipe(Recipe.parse(f"{NAS_ONLY}\nbudgets: {{macs: 0.001}}"), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def tiny_images() -> Data:
    """Digits cut to 4x4 pixels."""
    digits = load_data("digits", train_size=64)
    train, search, test = (
        [(x[:, 2:6, 2:6], y) for x, y in split] for split in (digits.train, digits.search, digits.test)
    )
    return Data("tiny", train, search, test, num_classes=10, input_shape=(1, 4, 4))


def test_images_too_small_for_the_space_are_refused() -> None:
    recipe = Recipe.from_mapping({"budgets": {"macs": 0.5}, "stages": ["nas", "train"]})
    with pytest.raises(RecipeError, match="8, 32, 224 pixels and more, got 4x4"):
        compress(None, tiny_images(), recipe)


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("stages: [nas]", "stages: nas finds a network that is not trained yet; add train"),
        ("nas: {space: mbconv}", "no space named 'mbconv'; did you mean 'mbconv_chain'?"),
        ("nas: {space_settings: {widht: 0.5}}", "mbconv_chain has no setting 'widht'; did you mean 'width'?"),
        ("nas: {settings: {variants: two}}", "method proxyless has no setting 'variants'"),
        ("nas: {warmup_epochs: 30}", "nas.warmup_epochs: must be < epochs (30), got 30"),
        (
            "nas: {supernet: nowhere}",
            "nas.num_plans must be >= 1 with nas.supernet, whose distribution is for another run",
        ),
        ("nas: {supernet: nowhere, num_plans: 3}", "nowhere holds no nas.checkpoint"),
        ("model: resnet20", "model: leave it out; stage nas finds the network"),
        ("alone: [prune]", "alone: compares stages of the run with the whole; stages lacks prune"),
    ],
)
def test_a_wrong_recipe_says_what_to_change(line: str, fault: str) -> None:
    base = {"data": "data: digits", "stages": "stages: [nas, train]", "budgets": "budgets: {macs: 0.5}"}
    text = "\n".join([line, *(text for key, text in base.items() if not line.startswith(key))])
    with pytest.raises(RecipeError) as raised:
        prepare(Recipe.parse(text))
    assert fault in str(raised.value)


def test_a_stage_alone_trains_for_as_many_epochs_as_the_whole() -> None:
    recipe = Recipe.parse(CHAIN.replace("train: {epochs: 1", "train: {epochs: 7"))
    nas, prune, bits = (alone_recipe(recipe, stage) for stage in ("nas", "prune", "quantise"))
    assert (nas.stages, nas.train.epochs) == (("nas", "train"), 9)
    assert (prune.stages, prune.finetune.epochs) == (("prune", "finetune"), 2)
    assert (bits.stages, bits.qat.epochs) == (("quantise", "qat"), 2)
    # Layers whose bits nobody decides have those that the whole run starts from.
    assert nas.bits is not None
    assert nas.bits.bits == Bits(8, 8)
    assert all(alone.budgets == recipe.budgets for alone in (nas, prune, bits))


JOINT = """
data: {name: digits, train_size: 256}
threads: 1
target: bismo-zynq7020
reference_bits: 8
budgets: {latency_ms: 0.25}
stages: [nas, train, qat]
search: {knobs: [arch, channels, bits], algorithm: random, num_plans: 4, baselines: []}
nas: {epochs: 1}
train: {epochs: 1, batch_size: 64}
prune: {round_to: 8}
quantise:
  weight_bits: [2, 4, 8]
  act_bits: [2, 4, 8]
  calibration_images: 64
  score_images: 50
qat: {epochs: 1, batch_size: 64}
"""


@pytest.fixture(scope="module")
def joint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "joint"
    run_recipe(Recipe.parse(JOINT), out=folder)
    return folder


def test_one_search_decides_architecture_channels_and_bits_within_the_budget(joint: Path) -> None:
    result = read(joint, "result.json")
    plan, target = Plan.from_json(json.dumps(result["plan"])), load_target("bismo-zynq7020")
    assert plan.arch
    assert plan.channels
    assert plan.bits
    space = joint_architectures_of(Recipe.parse(JOINT), load_data("digits")).joint
    latency = target(space.graph(plan))["latency_ms"]
    assert result["predicted"]["after"]["latency_ms"] == pytest.approx(latency, rel=1e-12)
    assert (
        latency
        <= result["budgets"]["latency_ms"]
        == 0.25 * target(space.graph(space.reference))["latency_ms"]
    )
    assert set(result["search"]) == {"nas"}
    assert (
        evaluate(load_compressed(None, joint), load_data("digits").test).accuracy
        == result["after"]["accuracy"]
    )
    assert "Architecture" in (joint / "report.html").read_text()


def test_a_joint_search_starts_its_training_from_the_supernets_weights(joint: Path, tmp_path: Path) -> None:
    stages: set[str] = set()
    recipe = Recipe.parse(
        JOINT, overrides=[f"nas.supernet={joint}", "target=bitfusion", "budgets={energy_mj: 0.4}", "seed=1"]
    )
    result = run_recipe(recipe, out=tmp_path / "run", on_event=lambda event: stages.add(event.stage))
    assert "nas" not in stages
    assert result.predicted["after"]["energy_mj"] <= result.budgets["energy_mj"]


def test_a_joint_run_interrupted_in_its_search_ends_as_the_straight_one(joint: Path, tmp_path: Path) -> None:
    def interrupt(event: Event) -> None:
        if event.stage == "nas random" and event.done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_recipe(Recipe.parse(JOINT), out=tmp_path / "run", on_event=interrupt)
    resume(tmp_path / "run")
    assert read(tmp_path / "run", "result.json")["plan"] == read(joint, "result.json")["plan"]
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "run", joint))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ("stages=[train, prune]", "knobs name arch, which stage nas decides; add nas to stages"),
        (
            "stages=[nas, train, prune, quantise]",
            "one search decides all; leave prune and quantise out of stages",
        ),
        ("search.knobs=[arch, arch]", "knobs are named once each, got [arch, arch]"),
        ("search.knobs=[bits]", "knobs must be [channels], or name arch, got [bits]"),
        ("search.knobs=[arch, channels]", "add quantise, or bits to search.knobs"),
        ("nas.space=nasbench201", "channels of nasbench201 cannot be searched jointly; take mbconv_chain"),
        ("search.algorithm=predictor", "search.num_plans: predictor needs at least 8"),
        ("quantise.act_bits=[]", "a joint search needs bits of activations as well, got none"),
    ],
)
def test_a_wrong_joint_recipe_says_what_to_change(change: str, fault: str) -> None:
    with pytest.raises(RecipeError) as raised:
        prepare(Recipe.parse(JOINT, overrides=[change]))
    assert fault in str(raised.value)


def test_settings_of_the_predictor_are_its_own() -> None:
    changes = ["search.algorithm=predictor", "search.num_plans=9", "search.settings={round: 2}"]
    with pytest.raises(RecipeError, match="search predictor has no setting 'round'; did you mean 'rounds'"):
        prepare(Recipe.parse(JOINT, overrides=changes))


@pytest.mark.slow
def test_a_predictor_searches_within_the_budget_and_pays_for_no_more_plans_than_it_may(
    tmp_path: Path,
) -> None:
    changes = ["search.algorithm=predictor", "search.num_plans=20", "search.settings={num_predicted: 200}"]
    result = run_recipe(Recipe.parse(JOINT, overrides=changes), out=tmp_path / "run")
    trials = read(tmp_path / "run", "trials.json")["nas"]["predictor"]
    assert {trial["source"] for trial in trials} == {"sample", "predicted"}
    assert len(trials) <= 20
    assert all(trial["cost"]["latency_ms"] <= result.budgets["latency_ms"] for trial in trials)
