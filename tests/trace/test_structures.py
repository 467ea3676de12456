"""Structures that are hard to prune: each shrinks exactly, or is locked with its name and a reason."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d, SqueezeExcitation, StochasticDepth
from trace_laws import assert_laws_hold

from autocompress.core.errors import UnsupportedModelError
from autocompress.trace import Trace, shrink, trace

SHAPE = (3, 6, 6)


class Between(nn.Module):
    """Something between two convolutions: the network in which one structure is looked at."""

    def __init__(self, middle: nn.Module, inputs: int = 8, outputs: int | None = None) -> None:
        super().__init__()
        self.first, self.middle = nn.Conv2d(3, inputs, 1), middle
        self.second, self.head = nn.Conv2d(outputs or inputs, 6, 1), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.second(self.middle(self.first(x)))).mean((2, 3)))


class Call(nn.Module):
    """A function as a module."""

    def __init__(self, function: object) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)  # type: ignore[operator,no-any-return]


def seeded(make: object) -> nn.Module:
    """What a factory makes, with a fixed seed, in evaluation mode."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().eval()  # type: ignore[operator,no-any-return]


def holds(
    make: object, *, num_plans: int = 4, shape: tuple[int, ...] = SHAPE, all_counted: bool = True
) -> Trace:
    """The laws on a network; returns its trace."""
    return assert_laws_hold(seeded(make), shape, num_plans, all_counted=all_counted)


def locked(traced: Trace) -> dict[str, str]:
    """Locked groups except the classes."""
    output = "network's output"
    return {g.name: g.locked for g in traced.graph.groups if g.locked and output not in g.locked}


def shuffled(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


def gated_by_chunks(x: Tensor) -> Tensor:
    value, gate = x.chunk(2, dim=1)
    return value * gate.sigmoid()


def written_into_a_copy(x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y[:, :, 1:] = x[:, :, :-1]
    return y


FREE = {
    "a channel shuffle by view and transpose": (lambda: Between(Call(shuffled)), 4),
    "a channel shuffle as a module": (lambda: Between(nn.ChannelShuffle(4)), 2),
    "a maxout over pairs": (
        lambda: Between(Call(lambda x: x.view(len(x), x.shape[1] // 2, 2, *x.shape[2:]).amax(2)), 8, 4),
        4,
    ),
    "a split into an open number of pairs": (
        lambda: Between(Call(lambda x: x.unflatten(1, (-1, 2)).sum(2)), 8, 4),
        4,
    ),
    "a gate by chunks": (
        lambda: Between(Call(gated_by_chunks), 8, 4),
        4,
    ),
    "a gate by slices": (
        lambda: Between(Call(lambda x: x[:, : x.shape[1] // 2] * x[:, x.shape[1] // 2 :].tanh()), 8, 4),
        4,
    ),
    "a gate by glu": (lambda: Between(Call(lambda x: F.glu(x, 1)), 8, 4), 4),
    "squeeze and excitation": (lambda: Between(SqueezeExcitation(8, 4)), 8),
    "frozen batch norm": (lambda: Between(FrozenBatchNorm2d(8)), 8),
    "dropped paths": (lambda: Between(nn.Sequential(StochasticDepth(0.5, "row"), nn.Dropout2d())), 8),
    "pixel shuffle": (lambda: Between(nn.PixelShuffle(2), 8, 2), 2),
    "pixel unshuffle": (lambda: Between(nn.PixelUnshuffle(2), 8, 32), 8),
    "resized maps": (lambda: Between(Call(lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"))), 8),
    "padded maps": (lambda: Between(Call(lambda x: F.pad(x, (1, 1, 2, 0), mode="replicate"))), 8),
    "an instance norm": (lambda: Between(nn.InstanceNorm2d(8, affine=True)), 8),
    "one slope for all channels": (lambda: Between(nn.PReLU()), 8),
    "channels last": (lambda: Between(Call(lambda x: x.permute(0, 2, 3, 1).tanh().movedim(-1, 1))), 8),
    "maps written into a copy": (lambda: Between(Call(written_into_a_copy)), 8),
    "channels twice": (lambda: Between(Call(lambda x: torch.cat([x, x.relu()], 1)), 8, 16), 8),
}


@pytest.mark.parametrize("name", FREE)
def test_what_keeps_channels_apart_is_pruned_exactly(name: str) -> None:
    make, units = FREE[name]
    graph = holds(make).graph
    assert (graph.group("first").size, graph.group("first").locked) == (units, None)


class Scaled(nn.Module):
    """Layer scale: bare parameters of several shapes."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.rand(c, 1, 1)), nn.Parameter(torch.rand(c))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift.view(1, -1, 1, 1)


def test_bare_parameters_of_one_number_per_channel_shrink_with_the_channels() -> None:
    traced = holds(lambda: Between(Scaled(8)))
    assert locked(traced) == {}
    small = shrink(seeded(lambda: Between(Scaled(8))), traced, {"first": np.array([1, 5])})
    assert (small.middle.scale.shape, small.middle.shift.shape) == ((2, 1, 1), (2,))


LOCKED = {
    "a mean over channels": (Call(lambda x: x * x.mean(1, keepdim=True)), "mean in 'middle' (Call) mixes"),
    "a softmax over channels": (nn.Softmax(dim=1), "softmax in 'middle' (Softmax) mixes"),
    "a group norm": (nn.GroupNorm(2, 8), "group_norm in 'middle' (GroupNorm) normalises"),
    "a local response norm": (nn.LocalResponseNorm(3), "'middle' (LocalResponseNorm)"),
    "reversed channels": (Call(lambda x: x.flip(1)), "flip in 'middle' (Call) mixes or re-orders"),
    "permuted channels": (Call(lambda x: x[:, torch.arange(7, -1, -1)]), "index in 'middle' (Call) takes"),
    "a fixed part": (
        Call(lambda x: torch.cat([x[:, :3] * 2, x[:, 3:]], 1)),
        "slice in 'middle' (Call) takes",
    ),
    "every second channel": (
        Call(lambda x: x[:, ::2].repeat_interleave(2, 1)),
        "slice in 'middle' (Call) takes",
    ),
    "a size written as a number": (Call(lambda x: x.reshape(-1, 8, 36).view(-1, 8, 6, 6)), "does not run"),
    "a fixed tensor": (
        Call(lambda x: x + torch.arange(8.0).view(8, 1, 1)),
        "add in 'middle' (Call) combines",
    ),
    "channels as positions": (
        Call(lambda x: F.avg_pool2d(x.transpose(1, 3), 1).transpose(1, 3)),
        "positions",
    ),
    "a Gram matrix": (
        Call(lambda x: (x.flatten(2) @ x.flatten(2).mT).flatten(1)[:, :8, None, None]),
        "two axes",
    ),
    "an operation without a rule": (
        Call(lambda x: torch.fft.ifft(torch.fft.fft(x, dim=1), dim=1).real),
        "fft",
    ),
    "values read by Python": (Call(lambda x: x * float(x[0, 0, 0, 0])), "in 'middle' (Call)"),
}


@pytest.mark.parametrize("name", LOCKED)
def test_what_mixes_or_places_channels_is_locked_with_its_module(name: str) -> None:
    middle, reason = LOCKED[name]
    traced = holds(lambda: Between(middle), num_plans=1, all_counted=False)
    assert reason in str(traced.graph.group("first").locked)
    assert traced.graph.group("second").locked is None


class ShuffleUnit(nn.Module):
    """ShuffleNet V2's unit: half of the channels pass, the others are transformed, then all are shuffled."""

    def __init__(self, c: int) -> None:
        super().__init__()
        half = c // 2
        self.branch = nn.Sequential(
            nn.Conv2d(half, half, 1),
            nn.ReLU(),
            nn.Conv2d(half, half, 3, 1, 1, groups=half),
            nn.Conv2d(half, half, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=1)
        return shuffled(torch.cat([a, self.branch(b)], 1))


def test_shuffled_units_are_pruned_inside_and_their_width_is_tied() -> None:
    traced = holds(lambda: Between(nn.Sequential(ShuffleUnit(8), ShuffleUnit(8), ShuffleUnit(8))))
    inside = {group.name for group in traced.graph.prunable if group.name.startswith("middle")}
    assert inside == {f"middle.{i}.branch.0" for i in range(3)}
    assert "all at once" in locked(traced)["first"]


class ConvNeXtBlock(nn.Module):
    """Depthwise convolution, LayerNorm over channels, a wide MLP, layer scale, residual."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.depthwise, self.norm = nn.Conv2d(c, c, 3, 1, 1, groups=c), nn.LayerNorm(c)
        self.wide, self.narrow = nn.Linear(c, 3 * c), nn.Linear(3 * c, c)
        self.scale = nn.Parameter(torch.rand(c, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return x + self.scale * self.narrow(F.gelu(self.wide(y))).permute(0, 3, 1, 2)


def test_a_layer_norm_locks_the_width_it_normalises_and_the_mlp_is_pruned() -> None:
    traced = holds(lambda: Between(ConvNeXtBlock(8)))
    assert {group.name for group in traced.graph.prunable} == {"middle.wide", "second"}
    assert "layer_norm in 'middle.norm' (LayerNorm)" in locked(traced)["first"]


class Patches(nn.Module):
    """Images to tokens, an encoder, the mean token to classes."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.embed, self.encoder, self.head = nn.Conv2d(3, 8, 2, 2), encoder, nn.Linear(8, 4)
        self.token, self.place = nn.Parameter(torch.rand(1, 1, 8)), nn.Parameter(torch.rand(1, 10, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.place
        return self.head(self.encoder(x)[:, 0])


class Attend(nn.Module):
    """Attention by hand: one projection for queries, keys and values."""

    def __init__(self, c: int = 8, heads: int = 2) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(c, 3 * c), nn.Linear(c, c)
        self.up, self.down = nn.Linear(c, 2 * c), nn.Linear(2 * c, c)

    def forward(self, x: Tensor) -> Tensor:
        n, t, c = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = (q @ k.transpose(-1, -2)).softmax(-1) @ v
        x = x + self.out(y.transpose(1, 2).reshape(n, t, c))
        return x + self.down(F.gelu(self.up(x)))


def test_attention_is_locked_with_its_module_and_the_mlp_is_pruned() -> None:
    traced = holds(lambda: Patches(nn.Sequential(Attend(), nn.LayerNorm(8))), all_counted=False)
    assert {group.name for group in traced.graph.prunable} == {"encoder.0.up"}
    assert "'encoder.0' (Attend)" in locked(traced)["encoder.0.qkv"]
    assert traced.graph.uncounted == (f"{2 * 10 * 10 * 8:,} MACs in matrix products or convolutions outside "
                                      "layer modules",)  # fmt: skip


def test_encoder_layers_of_torch_are_pruned_in_their_mlp() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    traced = holds(lambda: Patches(layer), all_counted=False)
    assert {group.name for group in traced.graph.prunable} == {"encoder.linear1"}
    assert "'encoder.self_attn' (MultiheadAttention)" in locked(traced)["embed"]


class Windows(nn.Module):
    """Tokens in windows that are stacked along the batch axis, as in Swin Transformers.

    The width of the input says how the output is arranged, so that the two could only shrink together.
    """

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        windows = x.view(n, c, h // 3, 3, w // 3, 3).permute(0, 2, 4, 3, 5, 1).reshape(-1, 9, c)
        y = self.narrow(torch.relu(self.wide(windows)))
        return y.view(n, h // 3, w // 3, 3, 3, c).permute(0, 5, 1, 3, 2, 4).reshape(n, c, h, w)


def test_windows_stacked_along_the_batch_count_in_full() -> None:
    traced = holds(lambda: Between(Windows()))
    (wide,) = [layer for layer in traced.graph.layers if layer.name == "middle.wide"]
    assert wide.macs == 36 * 8 * 12
    assert {group.name for group in traced.graph.prunable} >= {"middle.wide", "second"}
    assert "does not run" in str(traced.graph.group("middle.narrow").locked)


class WithAuxiliary(nn.Module):
    """A second head that runs in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)
        self.auxiliary = nn.Sequential(nn.Conv2d(8, 6, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 1))

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.body(x).relu()
        logits = self.head(x.mean((2, 3)))
        return (logits, self.auxiliary(x).mean((2, 3))) if self.training else logits


def test_heads_that_run_in_training_only_fit_the_pruned_network() -> None:
    traced = holds(WithAuxiliary)
    small = shrink(seeded(WithAuxiliary), traced, {"body": np.arange(3)})
    logits, auxiliary = small.train()(torch.randn(2, *SHAPE))
    assert logits.shape == auxiliary.shape == (2, 4)
    assert {group.name for group in traced.graph.prunable} == {"body"}


class Tied(nn.Module):
    """A decoder with the weights of the encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.decode.weight = self.encode.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.decode(self.encode(x).relu()).relu())


def test_layers_that_share_a_parameter_are_locked_with_its_names() -> None:
    reasons = set(locked(trace(Tied(), (6,))).values())
    assert all("'encode.weight', 'decode.weight' are one parameter" in reason for reason in reasons)
    assert not trace(Tied(), (6,)).graph.prunable


def test_a_layer_with_a_parametrised_weight_is_locked_with_the_remedy() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
    nn.utils.parametrizations.weight_norm(net[2])
    traced = assert_laws_hold(net.eval(), (4,), 1)
    assert not traced.graph.prunable
    assert all("remove the parametrisation" in reason for reason in locked(traced).values())


def test_a_convolution_called_as_a_function_is_locked_with_its_parameter() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(8, 8, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.kernel)

    traced = holds(lambda: Between(Functional()), num_plans=1, all_counted=False)
    assert "conv2d in 'middle' (Functional)" in locked(traced)["first"]
    assert "'middle.kernel'" in locked(traced)["first"]


def test_convolutions_on_images_stacked_along_the_batch_count_in_full() -> None:
    class Frames(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(1, 4, 3), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            maps = self.conv(x.flatten(0, 1).unsqueeze(1)).relu()
            return self.head(maps.view(len(x), -1, *maps.shape[1:]).mean((1, 3, 4)))

    assert holds(Frames).graph.layers[0].macs == 3 * 4 * 9 * 16


def test_networks_that_return_dictionaries_are_followed_and_their_outputs_locked() -> None:
    class Maps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.low, self.high = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 1)
            self.out = nn.Conv2d(5, 2, 1)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            low = self.low(x)
            return {"low": low, "out": self.out(self.high(low).relu())}

    traced = holds(Maps)
    assert {group.name for group in traced.graph.prunable} == {"high"}
    assert "output" in str(traced.graph.group("low").locked)


def test_a_network_that_returns_no_tensor_is_refused() -> None:
    class Nothing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> str:
            return str(self.conv(x).shape)

    with pytest.raises(UnsupportedModelError, match="holds no tensor"):
        trace(Nothing(), SHAPE)


def test_tracing_leaves_random_numbers_and_attention_settings_alone() -> None:
    state = torch.random.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trace(seeded(WithAuxiliary), SHAPE)
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.backends.mha.get_fastpath_enabled()
