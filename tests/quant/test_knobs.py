from __future__ import annotations

import numpy as np
import pytest
import torch
from networks import TinyMobileNet, TinyResNet, TinyVGG, seeded

from autocompress.core import Bits, Budget, LayerGraph, LayerSpec, Plan, Problem
from autocompress.envs import MixedPrecisionEnv
from autocompress.hardware_sim import MacsModel
from autocompress.quant import Skeleton, bit_knobs, reference_bits
from autocompress.trace import trace
from autocompress.zoo.models import build


def graph_of(kind: type[torch.nn.Module]) -> LayerGraph:
    return trace(seeded(kind), (3, 16, 16)).graph


def test_each_layer_decides_its_weights_then_its_activations_in_execution_order() -> None:
    graph = graph_of(TinyVGG)
    knobs = bit_knobs(graph, first_last="free")
    names = [layer.name for layer in graph.layers]
    assert [(k.name, k.kind) for k in knobs] == [(n, s) for n in names for s in ("weight_bits", "act_bits")]
    assert all(k.choices == (2, 3, 4, 5, 6, 7, 8) for k in knobs)


def test_first_and_last_layer_are_pinned_to_eight_bits() -> None:
    graph = graph_of(TinyVGG)
    names = [layer.name for layer in graph.layers]
    knobs = bit_knobs(graph, weight_bits=(1, 2, 4), act_bits=(2, 4))
    assert {k.name for k in knobs} == set(names[1:-1])
    bits = reference_bits(graph, weight_bits=(1, 2, 4), act_bits=(2, 4))
    assert bits == {n: Bits(8, 8) if n in (names[0], names[-1]) else Bits(4, 4) for n in names}


def test_only_the_image_is_pinned_where_the_rule_is_input() -> None:
    graph = graph_of(TinyVGG)
    first, *others = [layer.name for layer in graph.layers]
    knobs = bit_knobs(graph, weight_bits=(1, 2), act_bits=(1, 2), first_last="input")
    assert [k.kind for k in knobs if k.name == first] == ["weight_bits"]
    assert all(sum(k.name == name for k in knobs) == 2 for name in others)
    bits = reference_bits(graph, weight_bits=(1, 2), act_bits=(1, 2), first_last="input")
    assert bits[first] == Bits(2, 8)


def test_size_only_search_decides_weights_and_leaves_activations_float() -> None:
    graph = graph_of(TinyVGG)
    knobs = bit_knobs(graph, weight_bits=range(1, 9), act_bits=())
    assert {k.kind for k in knobs} == {"weight_bits"}
    bits = reference_bits(graph, weight_bits=range(1, 9), act_bits=())
    assert set(bits.values()) == {Bits(8, 32)}


def test_a_single_choice_is_no_decision() -> None:
    graph = graph_of(TinyVGG)
    assert {k.kind for k in bit_knobs(graph, act_bits=(8,))} == {"weight_bits"}


def test_kept_layers_have_no_knobs_and_stay_at_the_reference() -> None:
    graph = graph_of(TinyResNet)
    knobs = bit_knobs(graph, keep=["b.*"])
    assert not [k for k in knobs if k.name.startswith("b.")]
    assert [k for k in knobs if k.name.startswith("a.")]


def test_features_are_the_layer_facts_scaled_over_all_decisions() -> None:
    graph = graph_of(TinyMobileNet)
    knobs = bit_knobs(graph, first_last="free")
    facts = []
    for index, layer in enumerate(graph.layers):
        conv = layer.kind == "conv"
        weights = layer.out_channels * layer.in_channels // layer.groups * layer.kernel[0] * layer.kernel[1]
        row = [
            float(conv and layer.groups == layer.in_channels > 1),
            layer.in_channels,
            layer.out_channels,
            layer.stride[0] if conv else 0,
            layer.kernel[0],
            weights,
            layer.in_hw[0] * layer.in_hw[1],
            index,
        ]
        facts += [[*row, 1.0], [*row, 0.0]]
    table = np.array(facts, float)
    expected = (table - table.min(axis=0)) / (table.max(axis=0) - table.min(axis=0))
    np.testing.assert_allclose([k.features for k in knobs], expected)


def test_linear_layers_have_stride_zero_and_kernel_one() -> None:
    layers = (
        LayerSpec("conv", "conv", 3, 8, kernel=(3, 3), stride=(1, 1), in_hw=(8, 8), out_hw=(8, 8)),
        LayerSpec("strided", "conv", 8, 8, kernel=(5, 5), stride=(2, 2), in_hw=(8, 8), out_hw=(4, 4)),
        LayerSpec("fc", "linear", 128, 10),
    )
    conv, strided, fc = (k.features for k in bit_knobs(LayerGraph(layers), act_bits=(), first_last="free"))
    assert (conv[3], strided[3], fc[3]) == (0.5, 1.0, 0.0)
    assert (conv[4], strided[4], fc[4]) == (0.5, 1.0, 0.0)
    assert conv[8] == strided[8] == fc[8] == 1.0


def test_a_module_that_runs_twice_is_decided_once() -> None:
    layers = (
        LayerSpec("a", "conv", 3, 3, in_hw=(8, 8), out_hw=(8, 8)),
        LayerSpec("a@2", "conv", 3, 3, in_hw=(8, 8), out_hw=(8, 8), reuses="a"),
    )
    assert [k.name for k in bit_knobs(LayerGraph(layers), first_last="free")] == ["a", "a"]


@pytest.mark.parametrize("name", ["resnet20", "resnet20_b", "digits_mobilenet", "digits_vgg"])
def test_knobs_name_the_layers_that_the_quantiser_knows(name: str) -> None:
    model = build(name, num_classes=10).eval()
    graph = trace(model, (3, 32, 32)).graph
    assert {k.name for k in bit_knobs(graph, first_last="free")} == set(Skeleton(model).layers)


def test_every_plan_of_the_problem_holds_the_pinned_bits_and_the_environment_takes_its_knobs() -> None:
    graph = graph_of(TinyVGG)
    names = [layer.name for layer in graph.layers]
    problem = Problem(
        bit_knobs(graph),
        (Budget("bitops", 1e12, relative=False),),
        lambda plan: MacsModel()(plan.apply(graph)),
        lambda plan: 0.0,
        base=Plan(bits=reference_bits(graph)),
    )
    low = problem.plan([knob.choices[0] for knob in problem.knobs])
    assert low.bits == {n: Bits(8, 8) if n in (names[0], names[-1]) else Bits(2, 2) for n in names}
    env = MixedPrecisionEnv(problem)
    observation, _ = env.reset(seed=0)
    assert env.observation_space.contains(observation)


def test_all_faults_of_the_rules_come_at_once() -> None:
    graph = graph_of(TinyVGG)
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        bit_knobs(graph, weight_bits=(4, 2), act_bits=(0, 8), first_last="both", keep=["nothing"])  # type: ignore[arg-type]
    for word in ("weight_bits", "act_bits", "'both'", "nothing", "features"):
        assert word in str(caught.value)


@pytest.mark.parametrize("bits", [(2, 17), (2, 33), (0, 4)])
def test_widths_that_no_grid_has_are_refused(bits: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="must ascend, from 1 to 16 or 32"):
        bit_knobs(graph_of(TinyVGG), weight_bits=bits)


def test_each_width_has_an_equal_share_of_the_agents_answers() -> None:
    (knob, *_) = bit_knobs(graph_of(TinyVGG), first_last="free")
    answers = [knob.at((i + 0.5) / 7000) for i in range(7000)]
    assert [answers.count(bits) for bits in knob.choices] == [1000] * 7
    assert (knob.at(0.0), knob.at(1.0)) == (2, 8)
