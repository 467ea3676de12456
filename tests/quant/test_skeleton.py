from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from networks import (
    TinyDenseNet,
    TinyInception,
    TinyMobileNet,
    TinyPadded,
    TinyResNet,
    TinyVGG,
    conv_bn,
    seeded,
)
from torch import Tensor, fx, nn

from autocompress.core import Bits
from autocompress.core.errors import UnsupportedModelError
from autocompress.quant import INNER_BITS, Skeleton

NETWORKS = (TinyVGG, TinyResNet, TinyMobileNet, TinyDenseNet, TinyPadded)


def images(num: int = 4, size: int = 16) -> Tensor:
    return torch.randn(num, 3, size, size, generator=torch.Generator().manual_seed(0))


class Marker(nn.Module):
    """Stands where a quantiser or a quantised layer is put."""

    def __init__(self, label: str) -> None:
        super().__init__()
        self.label = label

    def forward(self, x: Tensor) -> Tensor:
        return x


def marked(model: nn.Module, bits: dict[str, Bits]) -> fx.GraphModule:
    skeleton = Skeleton(model)
    return skeleton.instrumented(
        bits,
        make_quantiser=lambda source, width: Marker(f"{source}@{width}"),
        make_layer=lambda layer, _: skeleton.layers[layer],
    )


def inputs_of(network: fx.GraphModule) -> dict[str, list[str]]:
    """Node -> what its inputs are: labels of quantisers, else names of nodes."""
    modules = dict(network.named_modules())

    def word(node: fx.Node) -> str:
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        return module.label if isinstance(module, Marker) else node.name

    return {word(node): [word(x) for x in node.all_input_nodes] for node in network.graph.nodes}


def uniform(model: nn.Module, bits: Bits) -> dict[str, Bits]:
    return dict.fromkeys(Skeleton(model).layers, bits)


@pytest.mark.parametrize("kind", NETWORKS)
def test_folding_batchnorm_changes_no_output(kind: type[nn.Module]) -> None:
    model = seeded(kind)
    before = copy.deepcopy(model.state_dict())
    folded = Skeleton(model).graph_module
    torch.testing.assert_close(folded(images()), model(images()), rtol=1e-5, atol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", [TinyVGG, TinyResNet, TinyMobileNet])
def test_batchnorm_behind_a_layer_is_folded_away(kind: type[nn.Module]) -> None:
    modules = Skeleton(seeded(kind)).graph_module.modules()
    assert not any(isinstance(module, nn.BatchNorm2d) for module in modules)


def test_batchnorm_that_no_layer_feeds_alone_stays() -> None:
    modules = Skeleton(seeded(TinyDenseNet)).graph_module.modules()
    assert sum(isinstance(module, nn.BatchNorm2d) for module in modules) == 4


def test_without_bits_nothing_is_put_in() -> None:
    model = seeded(TinyResNet)
    skeleton = Skeleton(model)
    network = marked(model, {})
    assert [n.name for n in network.graph.nodes] == [n.name for n in skeleton.graph_module.graph.nodes]


def test_weights_alone_leave_every_tensor_as_it_is() -> None:
    model = seeded(TinyResNet)
    assert "@" not in " ".join(inputs_of(marked(model, uniform(model, Bits(4, 32)))))


def test_quantisers_stand_before_pooling_and_flattening() -> None:
    model = seeded(TinyVGG)
    found = inputs_of(marked(model, uniform(model, Bits(4, 5))))
    assert found["features_0_0"] == ["x@5"]
    assert found["features_1"] == ["features_0_2@5"]  # max-pooling reads the quantised tensor
    assert found["features_2_0"] == ["features_1"]
    assert found["head_0"] == ["features_3"]
    assert found["features_3"] == ["features_2_2@5"]
    assert found["output"] == ["head_3"]  # the network's output is not quantised


def test_additions_and_averages_read_eight_bits() -> None:
    model = seeded(TinyResNet)
    found = inputs_of(marked(model, uniform(model, Bits(4, INNER_BITS))))
    assert found["add"] == [f"stem_2@{INNER_BITS}", f"a_1@{INNER_BITS}"]
    assert found["mean"] == [f"relu_1@{INNER_BITS}"]
    # One tensor, three readers at eight bits: one quantiser.
    assert [name for name in found if name.startswith("stem_2@")] == [f"stem_2@{INNER_BITS}"]
    assert found["a_0_0"] == [f"stem_2@{INNER_BITS}"]


def test_a_tensor_read_at_several_widths_is_rounded_to_the_widest_first() -> None:
    model = seeded(TinyResNet)
    bits = uniform(model, Bits(4, 4)) | {"shortcut": Bits(4, 2)}
    found = inputs_of(marked(model, bits))
    assert found["stem_2@8"] == ["stem_2"]
    assert found["stem_2@4"] == ["stem_2@8"]
    assert found["relu@8"] == ["relu"]  # nobody adds it, but two layers read it at different widths
    assert found["relu@4"] == found["relu@2"] == ["relu@8"]
    assert found["shortcut"] == ["relu@2"]


class Overwriting(nn.Module):
    """ReLUs, an addition and a method that write into their inputs, whose values are read again."""

    def __init__(self, *, inplace: bool = True) -> None:
        super().__init__()
        self.stem, self.act = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=inplace)
        self.a, self.b, self.head = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), nn.Linear(8, 10)
        self.inplace = inplace

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if self.inplace:
            self.act(x)  # the result is only seen because x itself changed
            y = F.relu(self.a(x), inplace=True)
            y += x
            y.mul_(0.5)
            z = self.b(y)
            z = torch.relu(z)
        else:
            x = self.act(x)
            y = (F.relu(self.a(x)) + x).mul(0.5)
            z = torch.relu(self.b(y))
        return self.head((z + y).mean((2, 3)))


def test_operations_that_overwrite_their_inputs_are_followed() -> None:
    overwriting, pure = seeded(Overwriting), Overwriting(inplace=False).eval()
    pure.load_state_dict(overwriting.state_dict())
    expected = pure(images())
    assert torch.equal(overwriting(images()), expected)
    assert torch.equal(Skeleton(overwriting).graph_module(images()), expected)
    bits = uniform(pure, Bits(4, 4))
    found = str(inputs_of(marked(overwriting, bits))).replace("iadd", "add").replace("mul_", "mul")
    assert found == str(inputs_of(marked(pure, bits)))


class Everything(nn.Module):
    """One of each thing that cannot be quantised."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.twice = conv_bn(3, 8), nn.Conv2d(8, 8, 1)
        self.up = nn.ConvTranspose2d(8, 8, 2, 2)
        self.round = nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular")
        self.weight = nn.Parameter(torch.zeros(8, 8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.twice(self.stem(x)))
        return F.conv2d(self.round(self.up(x)), self.weight).mean((2, 3))


def test_all_that_cannot_be_quantised_is_named_at_once_with_remedies() -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        Skeleton(seeded(Everything))
    text = str(caught.value)
    for words in (
        "'twice' runs more than once; give each call a layer of its own",
        "'up' (ConvTranspose2d) cannot be quantised; replace it",
        "'round' pads with 'circular', which integer kernels cannot; pad with zeros",
        "'conv2d' has no module; write it as nn.Conv2d",
    ):
        assert words in text


def test_transposed_convolutions_are_refused_by_name() -> None:
    with pytest.raises(UnsupportedModelError, match="'up'"):
        Skeleton(seeded(TinyInception))


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if x.sum() > 0 else x


def test_a_branch_on_values_is_refused_with_a_remedy() -> None:
    with pytest.raises(UnsupportedModelError, match=r"Branching cannot be quantised: .*Write the branch"):
        Skeleton(Branching())


def test_a_network_without_layers_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="no convolution or linear layer"):
        Skeleton(nn.Sequential(nn.ReLU()))


def test_bits_of_an_unknown_layer_are_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"no layer named \['nowhere'\]; the network has \['features.0.0'"):
        marked(seeded(TinyVGG), {"nowhere": Bits(4, 4)})
