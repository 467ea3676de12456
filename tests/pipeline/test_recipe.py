"""Reading, checking and writing recipes."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autocompress.agents import SEARCHES
from autocompress.core.budget import Budget
from autocompress.core.errors import RecipeError
from autocompress.hardware_sim import bundled_targets
from autocompress.pipeline.recipe import Algorithm, Recipe, bundled_recipes, find_recipe
from autocompress.training import TrainSettings

SMALL = "model: vgg16\ndata: digits\nbudgets: {macs: 0.5}\n"


def faults_of(text: str, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        Recipe.parse(text, source="r.yaml", overrides=overrides)
    return list(caught.value.faults)


def test_every_fault_is_reported_at_once_in_file_order_with_line_and_column() -> None:
    text = (
        "nam: x\n"
        "data: {name: digits, roott: 3}\n"
        "budgets: {macs: 0, bitop: 0.2, luts: 9}\n"
        'seed: "0"\n'
        "train: {epochs: 2, warmup_epochs: 5}\n"
        "search: {algorithm: dppg, num_plan: 9, num_plans: 1.5}\n"
        "seed: 1\n"
    )
    assert faults_of(text) == [
        "r.yaml:1:1: nam: unknown key; did you mean 'name'?",
        "r.yaml:2:22: data.roott: unknown key; did you mean 'root'?",
        "r.yaml:3:17: budgets.macs: budget on macs must be > 0, got 0.0",
        "r.yaml:3:20: budgets.bitop: must be one of macs, params, bitops, weight_bytes, latency_ms, "
        "energy_mj, peak_memory_bytes, luts, brams, dsps, got 'bitop'; did you mean 'bitops'?",
        "r.yaml:3:32: budgets.luts: nothing gives luts; set target to a machine; macs, params, bitops, "
        "weight_bytes, peak_memory_bytes are counted",
        "r.yaml:4:7: seed: must be a whole number, got '0'",
        "r.yaml:5:35: train.warmup_epochs: must be < epochs (2), got 5",
        "r.yaml:6:21: search.algorithm: must be one of ddpg, td3, sac, random, uniform, greedy, milp, "
        "cma_es, tpe, evolution, predictor, got 'dppg'; did you mean 'ddpg'?",
        "r.yaml:6:27: search.num_plan: unknown key; did you mean 'num_plans'?",
        "r.yaml:6:51: search.num_plans: must be a whole number, got 1.5",
        "r.yaml:7:1: key seed is repeated; keep one of them",
    ]


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("train: {lr: 0}", "train.lr: must be > 0, got 0"),
        ("train: {momentum: 1.0}", "train.momentum: must be < 1, got 1.0"),
        ("train: {lr: .inf}", "train.lr: must be a finite number, got inf"),
        ("train: {epochs: true}", "train.epochs: must be a whole number, got True"),
        ("train: {distill_weight: 0.5}", "train: distill_weight needs a teacher"),
        ("prune: {min_keep: 1.1}", "prune.min_keep: must be <= 1, got 1.1"),
        ("prune: {reconstruct: yes}", "prune.reconstruct: must be true or false, got 'yes'"),
        ("prune: {keep: conv1}", "prune.keep: must be a list, got 'conv1'"),
        ("search: {settings: {lr: .nan}}", "search.settings.lr: must be a finite number, got nan"),
        ("export: {opset: 9}", "export.opset: must be >= 18, got 9"),
        ("export:", "export: must be a mapping, got None"),
        ("name: a/b", "name: must be letters, digits"),
        ("seed: 4294967296", "seed: must be <= 4294967295, got 4294967296"),
        ("stages: [train, export]", "stages: must hold nas, prune or quantise, got train, export"),
        (
            "stages: [prune, train]",
            "stages: come once each, in the order nas, train, prune, finetune, quantise, qat, export",
        ),
        ("stages: [train, finetune, quantise]", "stages: finetune trains what prune makes; add prune"),
        ("stages: [prune, qat]", "stages: qat trains what quantise makes; add quantise"),
        ("prune: {budgets: {macs: 0.5}}", "prune: budgets of its own are for recipes with stage quantise"),
        ("search: {algorithm: milp}", "search: milp decides bits only; name it in quantise.search"),
        ("search: {baselines: [milp]}", "search: milp decides bits only; name it in quantise.search"),
        (
            "search: {num_plans: 9}\nstages: [train, quantise]",
            "search: looks for channels, and stages leaves out prune; move it to quantise.search",
        ),
        ("quantise: {weight_bits: [4, 2]}", "quantise.weight_bits: must be bit-widths in ascending order"),
        ("quantise: {act_bits: [0]}", "quantise.act_bits.0: must be >= 1, got 0"),
        ("quantise: {weight_bits: []}", "quantise.weight_bits: must hold one or more bit-widths up to 16"),
        ("quantise: {method: kmeans}", "quantise: method kmeans leaves activations in floating"),
        (
            "quantise: {method: kmeans, act_bits: [], weight_bits: [9]}",
            "quantise.weight_bits: must hold one or more bit-widths up to 8, got [9]",
        ),
        ("quantise: {asymmetric: true, power_of_two: true}", "quantise.power_of_two: power_of_two and"),
        (
            "quantise: {search: {num_plan: 3}}",
            "quantise.search.num_plan: unknown key; did you mean 'num_plans'?",
        ),
        ("stages: [prune, prune]", "stages: come once each"),
        ("device: gpu", "device: must be one of cpu, cuda, got 'gpu'"),
        ("target: bitfusio", "target: no target 'bitfusio'; did you mean 'bitfusion'?"),
        ("target: ''", "target: must not be empty"),
        ("target: 3", "target: must be text, got 3"),
        ("bits: {weight: 8}", "bits.act: required"),
        ("bits: {weight: 0, act: 8}", "bits.weight: must be >= 1, got 0"),
        ("bits: 8", "bits: must be a mapping, got 8"),
        ("reference_bits: 16", "reference_bits: must be one of 8, 32, got 16"),
        ("expected: {accuracy: 0.9}", "expected.accuracy: unknown key; did you mean 'accuracy_after'?"),
        ("expected: {accuracy_after: 98}", "expected.accuracy_after: must be <= 1, got 98"),
    ],
)
def test_a_value_out_of_its_range_names_rule_and_value(line: str, fault: str) -> None:
    (found,) = faults_of(SMALL + line)
    assert found.startswith("r.yaml:4:")
    assert found.split(": ", 1)[1].startswith(fault)


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        ("{name: digits, search_size: 1.5}", "data.search_size: must be a whole number of images"),
        ("{name: digits, mean: [0.5]}", "data: mean and std go together"),
        ("{name: digits, mean: [0.5], std: [0.5, 0.5]}", "data.std: mean and std go together"),
        ("{root: data}", "data.name: required"),
    ],
)
def test_data_settings_that_contradict_each_other_are_refused(data: str, fault: str) -> None:
    (found,) = faults_of(f"budgets: {{macs: 0.5}}\ndata: {data}")
    assert found.split(": ", 1)[1].startswith(fault)


@pytest.mark.parametrize("size", [5000, 0.1])
def test_search_size_is_a_count_or_a_share(size: float) -> None:
    recipe = Recipe.from_mapping({"budgets": {"macs": 1}, "data": {"name": "digits", "search_size": size}})
    assert recipe.data is not None
    assert recipe.data.search_size == size
    assert type(recipe.data.search_size) is type(size)


def test_numbers_and_words_are_read_as_yaml_1_2() -> None:
    recipe = Recipe.parse(SMALL + "train: {lr: 1e-3, epochs: 010}\nname: no\nprune: {keep: [on, 2024-01-01]}")
    assert (recipe.train.lr, recipe.train.epochs, recipe.name) == (0.001, 10, "no")
    assert recipe.prune.keep == ("on", "2024-01-01")


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("a: &x [1]\nb: *x", "&x: anchors and aliases are not allowed"),
        ("a: !!python/object:os.system ls", "tag tag:yaml.org,2002:python/object:os.system is not allowed"),
        ("a: !!set {b, c}", "tag tag:yaml.org,2002:set is not allowed"),
        ("a: !!int x", "'x' is not a valid int"),
        ("? [a, b]\n: 1", "keys must be text"),
        ("- a", "must be a mapping"),
        ("", "must be a mapping"),
        ("a: [1\nb: 2", "not valid YAML"),
        ("a: 1\n---\nb: 2", "not valid YAML"),
        ("a: \x01", "not valid YAML"),
        ("%YAML 1.1\n---\na: no", "recipes are YAML 1.2"),
        ("a: " + "[" * 3000 + "]" * 3000, "nested too deeply"),
        ("# " + "x" * 1_000_000, "larger than 1,000,000 bytes"),
    ],
)
def test_what_no_settings_file_needs_is_refused(text: str, fault: str) -> None:
    assert any(fault in found for found in faults_of(text))


def test_an_alias_bomb_is_refused_without_being_expanded() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 40)]
    assert sum("anchors and aliases" in fault for fault in faults_of("\n".join(lines))) == 40


def test_a_value_that_could_not_be_read_has_one_fault_only() -> None:
    assert faults_of(SMALL + "seed: !!int x") == ["r.yaml:4:7: 'x' is not a valid int"]


@pytest.mark.parametrize(
    ("short", "metric", "limit", "relative"),
    [
        ({"macs": 0.4}, "macs", 0.4, True),
        ({"macs": 1}, "macs", 1.0, True),
        ({"params": 1.2e6}, "params", 1.2e6, False),
        ({"flops": 0.4}, "macs", 0.4, True),
        ({"flops": 3e6}, "macs", 1.5e6, False),
        ([{"metric": "flops", "limit": 3e6, "relative": False}], "macs", 1.5e6, False),
        ([{"metric": "params", "limit": 0.5}], "params", 0.5, True),
    ],
)
def test_short_budgets_are_shares_up_to_one_and_a_mac_is_two_flops(
    short: Any, metric: Any, limit: float, relative: bool
) -> None:
    (settings,) = Recipe.from_mapping({"budgets": short}).budgets
    assert settings.budget == Budget(metric, limit, relative)


def test_a_flops_budget_says_what_it_became(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        Recipe.from_mapping({"budgets": {"flops": 3e6}})
    assert caplog.messages == ["budget of 3000000.0 FLOPs: that is 1500000.0 MACs (1 MAC = 2 FLOPs)"]


@pytest.mark.parametrize(
    ("budgets", "fault"),
    [
        ([], "must hold at least one budget"),
        ([{"metric": "macs", "limit": 0.5}, {"metric": "flops", "limit": 0.4}], "one budget per metric"),
        ([{"metric": "macs", "limit": 5}], "set relative: false for an absolute limit"),
        ([{"metric": "macs"}], "budgets.0.limit: required"),
        ({"macs": "half"}, "budgets.macs: must be a number, got 'half'"),
        (0.5, "budgets: must be a list, got 0.5"),
    ],
)
def test_budgets_that_make_no_sense_are_refused(budgets: Any, fault: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.from_mapping({"budgets": budgets})
    assert [fault in found for found in caught.value.faults] == [True]


def test_overrides_win_and_reach_into_short_forms() -> None:
    overrides = ["search.num_plans=7", "budgets.macs=0.25", "data.root=/x", "model=[a, b]", "model.1=c"]
    overrides += ["search.settings.lr=1e-3", "weights=", "prune={min_keep: 0.5}", "prune.round_to=4"]
    recipe = Recipe.parse(SMALL, overrides=overrides)
    assert recipe.search.num_plans == 7
    assert recipe.search.settings == {"lr": 1e-3}
    assert recipe.budgets[0].budget == Budget("macs", 0.25)
    assert recipe.data is not None
    assert (recipe.data.name, recipe.data.root) == ("digits", "/x")
    assert recipe.model == ("a", "c")
    assert recipe.weights is None
    assert (recipe.prune.min_keep, recipe.prune.round_to) == (0.5, 4)


def test_wrong_overrides_are_all_reported_by_their_own_text() -> None:
    overrides = ["search.num_plan=5", "seed", "model.3=x", "seed=[1", "seed.x=1", "prune.min_keep=2"]
    assert faults_of(SMALL + "seed: 0", *overrides) == [
        "--set model.3=x: '3' must be a position from 0 to 0 in this list",
        "--set prune.min_keep=2: prune.min_keep: must be <= 1, got 2",
        "--set search.num_plan=5: search.num_plan: unknown key; did you mean 'num_plans'?",
        "--set seed: an override is written path.to.key=value",
        "--set seed.x=1: seed is 0, which has nothing inside",
        "--set seed=[1: '[1' is not one YAML value; put quotes around text",
    ]


def test_the_algorithm_is_not_its_own_baseline() -> None:
    recipe = Recipe.parse(SMALL + "search: {algorithm: random, baselines: [uniform, random, uniform]}")
    assert recipe.search.baselines == ("uniform",)


def test_a_recipe_that_cannot_run_alone_names_everything_missing() -> None:
    recipe = Recipe.from_mapping({"budgets": {"macs": 0.5}, "stages": ["prune"]})
    with pytest.raises(RecipeError) as caught:
        recipe.check_complete()
    assert [fault.split(": ")[1] for fault in caught.value.faults] == ["model", "data", "weights"]


def test_weights_next_to_the_recipe_become_absolute_and_others_stay(tmp_path: Path) -> None:
    (tmp_path / "w.pth").touch()
    (tmp_path / "r.yaml").write_text(SMALL + "weights: w.pth")
    assert Recipe.load(tmp_path / "r.yaml").weights == str((tmp_path / "w.pth").resolve())
    assert Recipe.load(tmp_path / "r.yaml", ["weights=gone.pth"]).weights == "gone.pth"


def test_a_budget_is_on_what_is_counted_or_what_the_target_gives() -> None:
    counted = {"macs": 1, "params": 1, "bitops": 1, "weight_bytes": 1, "peak_memory_bytes": 1}
    Recipe.from_mapping({"budgets": counted})
    Recipe.from_mapping({"budgets": counted | {"latency_ms": 0.5, "energy_mj": 3.5}, "target": "eyeriss"})
    text = (
        "target: eyeriss\nbudgets: [{metric: luts, limit: 0.5}, {metric: dsps, limit: 9, relative: false}]\n"
        "stages: [prune, quantise]\nprune: {budgets: {macs: 0.5, brams: 3}}"
    )
    gives = f"eyeriss gives latency_ms, energy_mj; {', '.join(counted)} are counted"
    assert faults_of(text) == [
        f"r.yaml:2:20: budgets.0.metric: nothing gives luts; {gives}",
        f"r.yaml:2:48: budgets.1.metric: nothing gives dsps; {gives}",
        f"r.yaml:4:30: prune.budgets.brams: nothing gives brams; {gives}",
    ]


def test_a_target_file_is_found_here_then_beside_the_recipe_and_survives_moving(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundled = next(path for path in bundled_targets() if path.stem == "eyeriss").read_text()
    here, beside = tmp_path / "here", tmp_path / "beside"
    here.mkdir()
    beside.mkdir()
    (beside / "mine.yaml").write_text(bundled)
    text = "data: digits\nbudgets: {latency_ms: 0.5}\ntarget: "
    (beside / "r.yaml").write_text(text + "mine.yaml")
    (beside / "short.yaml").write_text(text + "mine")
    (beside / "shipped.yaml").write_text(text + "eyeriss")
    monkeypatch.chdir(here)
    assert Recipe.load(beside / "r.yaml").target == str(beside / "mine.yaml")
    assert Recipe.load(beside / "short.yaml").target == str(beside / "mine.yaml")
    assert Recipe.load(beside / "shipped.yaml").target == "eyeriss"
    (here / "mine.yaml").write_text(bundled)
    found = Recipe.load(beside / "r.yaml")
    assert found.target == str(here / "mine.yaml")
    monkeypatch.chdir(tmp_path)
    assert Recipe.parse(found.to_yaml()) == found


def test_every_fault_of_a_target_file_stands_at_the_target(tmp_path: Path) -> None:
    (tmp_path / "t.yaml").write_text("name: t\nmodel: eyeris\nabot: x\n")
    (tmp_path / "r.yaml").write_text("target: t.yaml\nbudgets: {latency_ms: 0.5}\nseed: -1\n")
    with pytest.raises(RecipeError) as caught:
        Recipe.load(tmp_path / "r.yaml")
    places = [fault.removeprefix(f"{tmp_path}/").split(" ")[0] for fault in caught.value.faults]
    assert places == ["r.yaml:1:9:"] * 3 + ["r.yaml:3:7:"]
    assert "unknown key 'abot'" in str(caught.value)


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="cannot be read as UTF-8"):
        Recipe.load(tmp_path / "r.yaml")


text = st.text(min_size=1, max_size=20)
positive = st.floats(min_value=1e-300, max_value=1e300)
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | text
recipes = st.fixed_dictionaries(
    {
        "budgets": st.fixed_dictionaries({"macs": positive}, optional={"params": positive}),
        "data": st.fixed_dictionaries(
            {"name": text},
            optional={"search_size": st.integers(1, 10**6) | st.floats(0.001, 0.999), "root": text},
        ),
    },
    optional={
        "name": st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,30}", fullmatch=True),
        "model": st.lists(text, unique=True),
        "seed": st.integers(0, 2**32 - 1),
        "threads": st.none() | st.integers(1, 64),
        "train": st.fixed_dictionaries({}, optional={"lr": positive, "weight_decay": positive}),
        "prune": st.fixed_dictionaries({}, optional={"keep": st.lists(text)}),
        "search": st.fixed_dictionaries(
            {},
            optional={
                "algorithm": st.sampled_from(
                    [name for name in get_args(Algorithm) if name not in ("milp", "predictor")]
                ),
                "settings": st.dictionaries(text, scalars | st.lists(scalars), max_size=4),
            },
        ),
        "quantise": st.fixed_dictionaries(
            {
                "search": st.fixed_dictionaries(
                    {}, optional={"algorithm": st.sampled_from(get_args(Algorithm))}
                )
            }
        ),
        "expected": st.fixed_dictionaries({}, optional={"accuracy_after": st.floats(0.01, 1)}),
        "target": st.sampled_from(["eyeriss", "bismo-zynq7020"]),
        "bits": st.fixed_dictionaries({"weight": st.integers(1, 32), "act": st.integers(1, 32)}),
        "reference_bits": st.sampled_from([8, 32]),
    },
)


@settings(deadline=None, max_examples=60)
@given(recipes)
def test_a_recipe_survives_yaml_and_back(data: dict[str, Any]) -> None:
    recipe = Recipe.from_mapping(data)
    again = Recipe.parse(recipe.to_yaml())
    assert again == recipe
    assert again.digest == recipe.digest


def test_the_digest_depends_on_what_can_change_the_result_only() -> None:
    recipe = Recipe.parse(SMALL)
    same = Recipe.parse(SMALL, overrides=["name=other", "expected={accuracy_after: 0.9}"])
    assert same.digest == recipe.digest
    changes = ["seed=1", "threads=1", "budgets.macs=0.4", "prune.keep=[a]", "finetune.epochs=3", "model=x"]
    changes += ["target=eyeriss", "bits={weight: 8, act: 8}", "reference_bits=8"]
    digests = {Recipe.parse(SMALL, overrides=[change]).digest for change in changes}
    assert len(digests | {recipe.digest}) == len(changes) + 1


def test_every_bundled_recipe_can_run_alone_and_is_named_after_its_file() -> None:
    names = [path.stem for path in bundled_recipes()]
    assert "digits" in names
    for name in names:
        recipe = Recipe.load(name)
        recipe.check_complete()
        assert recipe.name == name.replace("_", "-")


def test_bundled_recipes_are_found_with_and_without_ending_and_misspelt_ones_suggested() -> None:
    assert find_recipe("digits") == find_recipe("digits.yaml")
    with pytest.raises(
        RecipeError,
        match=r"no recipe 'digts'; did you mean 'digits'\?; bundled are chain_cifar10_zynq7020, cnv_",
    ):
        find_recipe("digts")


def test_a_path_comes_before_a_bundled_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "digits.yaml").write_text(SMALL)
    monkeypatch.chdir(tmp_path)
    assert find_recipe("digits.yaml") == Path("digits.yaml")


def test_stage_settings_hold_exactly_the_fields_of_train_settings() -> None:
    fields = json.loads(Recipe.parse(SMALL).model_dump_json())
    names = {field.name for field in dataclasses.fields(TrainSettings)}
    assert set(fields["train"]) == set(fields["finetune"]) == set(fields["qat"]) == names


def test_bits_are_searched_by_milp_beside_uniform_plans_whoever_searches_channels() -> None:
    recipe = Recipe.parse(SMALL + "stages: [prune, quantise]\nsearch: {algorithm: greedy, num_plans: 40}")
    bits = recipe.quantise.search
    assert (bits.algorithm, bits.num_plans, bits.baselines) == ("milp", 100, ("uniform",))
    assert (recipe.search.algorithm, recipe.search.num_plans) == ("greedy", 40)
    some = Recipe.parse(SMALL + "stages: [quantise]\nquantise: {search: {num_plans: 7}}").quantise.search
    assert (some.algorithm, some.num_plans, some.baselines) == ("milp", 7, ("uniform",))


def test_a_recipe_can_name_exactly_the_searches_there_are() -> None:
    assert set(get_args(Algorithm)) == {*SEARCHES, "predictor"}
