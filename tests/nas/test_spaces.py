"""Every member of every space: its graph is the one traced, and the rest of the package takes it."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from autocompress.core import Bits, Budget, Plan
from autocompress.core.errors import InfeasibleBudgetError, RecipeError
from autocompress.hardware_sim import MacsModel, load_target
from autocompress.nas.spaces import (
    LAYOUTS,
    Darts,
    Layout,
    MBConvChain,
    NASBench201,
    Space,
    Stage,
    arch_knobs,
    arch_problem,
    mbconv_chain,
    operation_costs,
)
from autocompress.nas.spaces.costs import arch_price, member_graph
from autocompress.quant.skeleton import Skeleton
from autocompress.trace import measure, shrink, trace

TINY_CHAIN = MBConvChain(Layout(4, 1, 4, (Stage(4, 2, 1), Stage(6, 1, 2)), 8), (1, 8, 8), 10, kernels=(3, 5))
SPACES: tuple[Space, ...] = (
    mbconv_chain((1, 8, 8), 10),
    TINY_CHAIN,
    NASBench201((3, 8, 8), 10, channels=4, cells_per_stage=1),
    NASBench201((1, 16, 16), 5, channels=8, cells_per_stage=2),
    Darts((3, 8, 8), 10, channels=4, num_cells=3),
    Darts((3, 16, 16), 10, channels=5, num_cells=5),
)


def ids(space: Space) -> str:
    return f"{space.name}-{space.input_shape[1]}"


def any_member(space: Space, generator: np.random.Generator) -> dict[str, str]:
    """Half of the decisions at their first operation, so that dead edges and blocks are frequent."""
    wild = space.random(generator)
    return (
        {
            name: ops[0] if generator.random() < 0.5 else str(generator.choice(ops))
            for name, ops in space.decisions.items()
        }
        if generator.random() < 0.5
        else wild
    )


def assert_member_is_whole(space: Space, arch: dict[str, str], generator: np.random.Generator) -> None:
    """The graph is the traced one, and tracing, quantising and shrinking the network all work."""
    model = space.build(arch, seed=0).eval()
    traced = trace(model, space.input_shape)
    assert space.graph(arch) == traced.graph
    assert all(group.locked is None for group in traced.graph.groups if "classifier" not in group.producers)
    kept = {
        g.name: np.sort(generator.choice(g.size, generator.integers(1, g.size + 1), replace=False))
        for g in traced.graph.prunable
    }
    small = shrink(model, traced, kept)
    predicted = MacsModel()(space.graph(arch).with_channels({name: len(k) for name, k in kept.items()}))
    assert measure(small, space.input_shape) == {m: predicted[m] for m in ("macs", "params")}
    images = torch.randn(2, *space.input_shape, generator=torch.Generator().manual_seed(0))
    skeleton = Skeleton(small)
    assert set(skeleton.layers) == {layer.name for layer in traced.graph.layers}
    with torch.no_grad():
        torch.testing.assert_close(skeleton.graph_module(images), small(images), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("space", SPACES, ids=ids)
def test_random_members_have_the_graph_that_tracing_finds_and_can_be_shrunk_and_quantised(
    space: Space,
) -> None:
    generator = np.random.default_rng(0)
    for _ in range(4):
        assert_member_is_whole(space, any_member(space, generator), generator)


@pytest.mark.slow
@pytest.mark.parametrize("space", [*SPACES, mbconv_chain((3, 32, 32), 10)], ids=ids)
def test_twenty_random_members_have_the_graph_that_tracing_finds(space: Space) -> None:
    generator = np.random.default_rng(1)
    for _ in range(20):
        assert_member_is_whole(space, any_member(space, generator), generator)


@pytest.mark.parametrize("space", SPACES, ids=ids)
def test_the_smallest_and_the_largest_member_are_whole(space: Space) -> None:
    generator = np.random.default_rng(2)
    for end in (0, -1):
        assert_member_is_whole(space, {name: ops[end] for name, ops in space.decisions.items()}, generator)


def test_sizes_of_the_published_spaces() -> None:
    # ProxylessNAS: 21 blocks, of which six change width and cannot be skipped.
    chain = mbconv_chain((3, 224, 224), 1000)
    assert (len(chain.decisions), chain.num_members) == (21, 6**6 * 7**15)
    assert NASBench201().num_members == 15_625 == sum(1 for _ in NASBench201().members())
    assert (len(Darts().decisions), Darts().num_members) == (28, 8**28)


# Released networks (mit-han-lab/proxylessnas; widths, operations and parameter counts as restated and
# asserted in osmr/imgclsmob, proxylessnas.py). MACs of the GPU network: 465 M in its released evaluation log.
PUBLISHED = (
    (
        (32, 16, (32, 40, 80, 96, 192, 320), 1280),
        "k5e3 k3e3 - -  k7e3 k3e3 k5e3 k5e3  k7e6 k5e3 k5e3 k5e3  "
        "k5e6 k5e3 k5e3 k5e3  k7e6 k7e6 k7e3 k7e3 k7e6",
        4_080_512,
        None,
    ),
    (
        (40, 24, (32, 56, 112, 128, 256, 432), 1728),
        "k5e3 - - -  k7e3 - - k3e3  k7e6 - - k5e3  k5e6 - k3e3 k5e3  k7e6 k7e6 k7e6 k5e6 k7e6",
        7_119_848,
        465e6,
    ),
)


@pytest.mark.parametrize(("widths", "operations", "num_params", "macs"), PUBLISHED)
def test_published_networks_are_members_with_their_published_sizes(
    widths: tuple[int, int, tuple[int, ...], int], operations: str, num_params: int, macs: float | None
) -> None:
    stem, first, stages, head = widths
    shapes = zip(stages, (4, 4, 4, 4, 4, 1), (2, 2, 2, 1, 2, 1), strict=True)
    layout = Layout(stem, 2, first, tuple(Stage(*shape) for shape in shapes), head)
    space = MBConvChain(layout, (3, 224, 224), 1000)
    chosen = operations.replace("-", "skip").split()
    cost = MacsModel()(space.graph(dict(zip(space.decisions, chosen, strict=True))))
    assert cost["params"] == num_params
    assert macs is None or cost["macs"] == pytest.approx(macs, rel=0.005)


def test_cells_without_dead_edges_have_the_parameters_that_nas_bench_201_publishes(shared: Path) -> None:
    published = json.loads((shared / "data/nas/zc_nasbench201.json").read_text())["cifar10"]
    names = ("skip_connect", "none", "nor_conv_3x3", "nor_conv_1x1", "avg_pool_3x3")
    space, num_equal = NASBench201(), 0
    for key, scores in published.items():
        codes = [int(code) for code in key.strip("()").split(", ")]
        arch = {name: names[code] for name, code in zip(ORDER, codes, strict=True)}
        ours, theirs = MacsModel()(space.graph(arch))["params"] / 1e6, scores["params"]["score"]
        assert ours <= theirs + 1e-9
        if "none" not in arch.values():
            assert ours == pytest.approx(theirs, abs=1e-9)
            num_equal += 1
    assert num_equal > 100


ORDER = ("cell.0_1", "cell.0_2", "cell.0_3", "cell.1_2", "cell.1_3", "cell.2_3")


def test_the_notation_of_nas_bench_201_survives_both_ways() -> None:
    space = NASBench201()
    text = "|nor_conv_3x3~0|+|nor_conv_3x3~0|avg_pool_3x3~1|+|skip_connect~0|nor_conv_3x3~1|skip_connect~2|"
    arch = space.from_text(text)
    assert [arch[name] for name in ("cell.0_2", "cell.1_2", "cell.2_3")] == [
        *("nor_conv_3x3", "avg_pool_3x3", "skip_connect"),
    ]
    assert all(
        space.from_text(space.to_text(a)) == a for a in itertools.islice(space.members(), 0, None, 500)
    )
    with pytest.raises(RecipeError, match="missing"):
        space.from_text("|nor_conv_3x3~0|+|none~0|none~1|")


def test_a_dead_edge_costs_nothing_and_is_not_built() -> None:
    space = NASBench201((3, 8, 8), 10, channels=4, cells_per_stage=1)
    dead = dict.fromkeys(space.decisions, "none") | {"cell.0_1": "nor_conv_3x3", "cell.0_3": "nor_conv_1x1"}
    alive = dead | {"cell.0_1": "none"}
    assert space.graph(dead) == space.graph(alive)
    assert not any("0_1" in name for name, _ in space.build(dead, seed=0).named_modules())


def test_a_derived_darts_cell_has_two_edges_per_node_and_never_none() -> None:
    space = Darts((3, 8, 8), 10, channels=4, num_cells=3)
    generator = np.random.default_rng(0)
    probabilities = {name: generator.dirichlet(np.ones(len(ops))) for name, ops in space.decisions.items()}
    for arch in (space.derive(probabilities), space.random(generator)):
        for kind in ("normal", "reduce"):
            for node in range(2, 6):
                present = [arch[f"{kind}.{source}_{node}"] != "none" for source in range(node)]
                assert sum(present) == 2
    arch = space.derive(probabilities)
    best = {name: max(p[1:]) for name, p in probabilities.items()}
    for node in range(2, 6):
        names = [f"normal.{source}_{node}" for source in range(node)]
        assert {n for n in names if arch[n] != "none"} == set(sorted(names, key=lambda n: -best[n])[:2])


@pytest.mark.parametrize("space", [*SPACES, mbconv_chain((3, 32, 32), 10)], ids=ids)
def test_knobs_order_operations_by_cost_and_an_earlier_choice_is_never_dearer(space: Space) -> None:
    for model, metric in ((MacsModel(), "macs"), (load_target("titan-x-pascal"), "latency_ms")):
        knobs, generator = arch_knobs(space, model, metric), np.random.default_rng(0)
        assert [knob.name for knob in knobs] == sorted(space.decisions, key=list(space.decisions).index)
        for _ in range(6):
            arch = any_member(space, generator)
            knob = knobs[int(generator.integers(len(knobs)))]
            costs = [model(space.graph({**arch, knob.name: str(c)}))[metric] for c in knob.choices]
            assert all(a <= b * (1 + 1e-9) for a, b in itertools.pairwise(costs))


def test_leaving_out_comes_first_among_operations_that_cost_nothing() -> None:
    knobs = arch_knobs(NASBench201())
    assert all(k.choices[:3] == ("none", "skip_connect", "avg_pool_3x3") for k in knobs)
    assert arch_knobs(mbconv_chain((1, 8, 8), 10))[1].choices[0] == "skip"


@pytest.mark.parametrize("target", ["titan-x-pascal", "jetson-tx2", "systolic-16x16", "edge-tpu-like"])
def test_the_table_of_operations_prices_every_member_of_a_chain(target: str) -> None:
    model, space = load_target(target), TINY_CHAIN
    bits = None if target in ("titan-x-pascal", "jetson-tx2") else Bits(8, 8)
    costs = operation_costs(space, model, "latency_ms", bits=bits)
    for arch in itertools.islice(space.members(), 0, None, 7):
        expected = model(member_graph(space, arch, bits))["latency_ms"]
        assert arch_price(costs, space, arch) == pytest.approx(expected, rel=1e-9)


def test_a_problem_of_architectures_keeps_its_budget_whatever_is_wanted() -> None:
    space = TINY_CHAIN
    problem = arch_problem(space, MacsModel(), [Budget("macs", 0.6)], evaluate=lambda plan: 0.0)
    generator = np.random.default_rng(0)
    for _ in range(20):
        wanted = [knob.choices[int(generator.integers(len(knob.choices)))] for knob in problem.knobs]
        plan = problem.plan(problem.bounded(wanted))
        assert problem.meets_budgets(problem.price(plan))
        assert Plan.from_json(plan.to_json()) == plan


def test_a_space_whose_smallest_member_is_over_budget_is_refused_with_its_cost() -> None:
    smallest = MacsModel()(TINY_CHAIN.graph({n: o[0] for n, o in TINY_CHAIN.decisions.items()}))["macs"]
    with pytest.raises(InfeasibleBudgetError, match=f"smallest member of mbconv_chain needs {smallest:,.6g}"):
        arch_problem(
            TINY_CHAIN, MacsModel(), [Budget("macs", smallest - 1, relative=False)], evaluate=lambda plan: 0.0
        )


@pytest.mark.parametrize("size", [4, 7, 48])
def test_images_too_small_or_odd_for_the_halvings_are_refused(size: int) -> None:
    with pytest.raises(RecipeError, match=f"{size}x{size}.*(layout|Layout)"):
        MBConvChain(LAYOUTS[224], (3, size, size), 10)
    if size < 8:
        with pytest.raises(RecipeError, match=f"got {size}x{size}"):
            mbconv_chain((3, size, size), 10)
    if size % 4:
        for kind in (NASBench201, Darts):
            with pytest.raises(RecipeError, match="multiples of 4"):
                kind((3, size, size), 10)


def test_settings_out_of_range_are_all_named_at_once() -> None:
    with pytest.raises(RecipeError) as caught:
        MBConvChain(Layout(4, 1, 4, (Stage(0, 1, 3),), 8), (1, 8, 8), 10, kernels=(4,), expansions=(6, 3))
    assert len(caught.value.faults) == 3
    with pytest.raises(RecipeError) as caught:
        NASBench201().check({"cell.0_1": "conv", "cel.0_2": "none"})
    assert len(caught.value.faults) == 7


def test_an_unknown_operation_names_those_on_offer() -> None:
    space = TINY_CHAIN
    with pytest.raises(RecipeError, match=r"block03.*offers k3e3"):
        space.build({**{n: o[-1] for n, o in space.decisions.items()}, "block03": "skip"}, seed=0)


def test_building_draws_weights_from_the_seed_alone() -> None:
    space = TINY_CHAIN
    arch = space.random(np.random.default_rng(0))
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first, second, other = (space.build(arch, seed=s) for s in (0, 0, 1))
    assert torch.equal(before, torch.random.get_rng_state())
    weights = [nn.utils.parameters_to_vector(m.parameters()) for m in (first, second, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_features_lie_in_the_unit_interval_and_the_last_decision_is_furthest() -> None:
    for space in SPACES:
        knobs = arch_knobs(space)
        assert knobs[-1].features[0] == 1.0
        assert math.isclose(max(k.features[2] for k in knobs), 1.0)
