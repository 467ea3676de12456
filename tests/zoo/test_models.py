"""Networks by name."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autocompress import zoo
from autocompress.core.errors import RecipeError


def _num_weights(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", list(zoo.MODELS))
def test_every_network_gives_one_logit_per_class_and_takes_other_channels(name: str) -> None:
    size = 8 if name.startswith("digits") else 32
    model = zoo.build(name, num_classes=7, in_channels=2).eval()
    assert model(torch.zeros(3, 2, size, size)).shape == (3, 7)


@pytest.mark.parametrize(("name", "depth"), [("resnet20", 20), ("resnet32", 32), ("resnet56", 56)])
def test_resnets_have_the_parameters_of_the_paper(name: str, depth: int) -> None:
    # He et al., arXiv 1512.03385, table 6: 0.27 M, 0.46 M and 0.85 M.
    blocks = (depth - 2) // 6
    convs = 3 * 16 * 9 + 2 * blocks * 16 * 16 * 9
    convs += sum(9 * (c // 2 * c + (2 * blocks - 1) * c * c) for c in (32, 64))
    norms = 2 * (16 + 2 * blocks * (16 + 32 + 64))
    model = zoo.build(name, num_classes=10)
    assert _num_weights(model) == convs + norms + 64 * 10 + 10
    assert round(_num_weights(model) / 1e6, 2) == {20: 0.27, 32: 0.46, 56: 0.85}[depth]


def test_vgg16_has_thirteen_convolutions_of_the_paper_and_one_linear_layer() -> None:
    # Simonyan and Zisserman, arXiv 1409.1556, table 1, column D.
    model = zoo.build("vgg16", num_classes=10)
    widths = [m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert widths == [64] * 2 + [128] * 2 + [256] * 3 + [512] * 6
    assert [m.in_features for m in model.modules() if isinstance(m, nn.Linear)] == [512]


def test_cnv_has_the_weights_of_finns_network() -> None:
    # Xilinx/BNN-PYNQ at d39c1c7, bnn/src/network/cnvW1A1/hw/config.h: rows times columns of the layers, the
    # last of them padded there to 64 outputs.
    shapes = [(27, 64), (576, 64), (576, 128), (1152, 128), (1152, 256), (2304, 256), (256, 512), (512, 512)]
    model = zoo.build("cnv", num_classes=64)
    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert [(m.weight[0].numel(), len(m.weight)) for m in layers] == [*shapes, (512, 64)]


def test_mobilenet_v2_has_torchvisions_parameters() -> None:
    # The strides differ, not the weights: torchvision's published count for 1000 classes.
    assert _num_weights(zoo.build("mobilenet_v2", num_classes=1000)) == 3_504_872


def test_mobilenet_v1_has_the_parameters_of_the_paper() -> None:
    # Howard et al., arXiv 1704.04861, table 8: 4.2 million for 1000 classes.
    assert round(_num_weights(zoo.build("mobilenet_v1", num_classes=1000)) / 1e6, 1) == 4.2


@pytest.mark.parametrize("name", ["digits_vgg", "digits_mobilenet"])
def test_digits_networks_are_small_and_their_widths_are_multiples_of_8(name: str) -> None:
    model = zoo.build(name, num_classes=10, in_channels=1)
    assert 30_000 <= _num_weights(model) <= 100_000
    assert all(m.out_channels % 8 == 0 for m in model.modules() if isinstance(m, nn.Conv2d))


def test_the_padded_shortcut_keeps_the_input_in_the_middle_channels() -> None:
    block = zoo.build("resnet20", num_classes=10).eval().layer2[0]
    nn.init.zeros_(block.bn2.weight)  # leaves the shortcut alone
    x = torch.rand(2, 16, 8, 8)
    out = block(x)
    assert torch.equal(out[:, 8:24], F.relu(x[:, :, ::2, ::2]))
    assert not out[:, :8].any()
    assert not out[:, 24:].any()


def test_plain20_has_the_weights_of_resnet20_and_no_shortcut() -> None:
    plain = zoo.build("plain20", num_classes=10).eval()
    assert {k: v.shape for k, v in plain.state_dict().items()} == {
        k: v.shape for k, v in zoo.build("resnet20", num_classes=10).state_dict().items()
    }
    nn.init.zeros_(plain.layer1[0].bn2.weight)
    assert not plain.layer1[0](torch.rand(1, 16, 8, 8)).any()


def test_a_torchvision_network_is_built_with_its_number_of_classes() -> None:
    assert zoo.build("torchvision:resnet18", num_classes=7).fc.out_features == 7


def test_torchvision_networks_with_auxiliary_outputs_give_one_tensor_in_training() -> None:
    model = zoo.build("torchvision:googlenet", num_classes=3).train()
    assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 3)


@pytest.mark.parametrize(
    ("name", "channels", "says"),
    [
        ("resnet21", 3, "did you mean .*resnet20"),
        ("torchvision:resnet19", 3, "did you mean .*resnet18"),
        ("torchvision:resnet18", 1, "takes 3 input channels, got 1"),
        ("no_such_package:make", 3, "cannot import 'no_such_package'"),
        ("json:no_such_thing", 3, "has no 'no_such_thing'"),
        ("json:dumps", 3, "json:dumps"),
        ("json:", 3, "pkg.mod:thing"),
    ],
)
def test_a_wrong_name_is_refused_with_the_way_out(name: str, channels: int, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        zoo.build(name, num_classes=10, in_channels=channels)


def test_both_wrong_numbers_are_named_at_once() -> None:
    with pytest.raises(RecipeError) as caught:
        zoo.build("vgg16", num_classes=0, in_channels=-1)
    assert len(caught.value.faults) == 2


def test_a_users_factory_gets_the_arguments_it_accepts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = "from torch import nn\ndef make(num_classes): return nn.Linear(4, num_classes)\n"
    (tmp_path / "their_networks.py").write_text(
        source + "def number(): return 3\ndef fails(): raise KeyError('x')"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert zoo.build("their_networks:make", num_classes=6).out_features == 6
    with pytest.raises(RecipeError, match=r"must return a torch.nn.Module, got int"):
        zoo.build("their_networks:number", num_classes=6)
    with pytest.raises(RecipeError, match="'their_networks:fails' failed: KeyError"):
        zoo.build("their_networks:fails", num_classes=6)
    sys.modules.pop("their_networks")
