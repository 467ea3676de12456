"""Which rule answers for which torch operation."""

from __future__ import annotations

from typing import Any

import torch

from autocompress.trace import operations as ops

# Element-wise operations that PyTorch does not tag as such, and those that change no element.
_ELEMENTWISE = (
    "hardswish masked_fill _prelu_kernel rrelu_with_noise log_sigmoid_forward rsub floor_divide "
    "dropout native_dropout alpha_dropout feature_dropout feature_alpha_dropout bernoulli uniform normal "
    "random exponential fill zero copy _to_copy alias detach lift_fresh clone"
)
_LIKE = "zeros_like ones_like empty_like full_like rand_like randn_like"
_REDUCE = (
    "mean sum prod amax amin max min argmax argmin all any var std var_mean std_mean logsumexp norm "
    "linalg_vector_norm count_nonzero aminmax median nansum nanmean"
)
_ALONG = (
    "softmax _softmax log_softmax _log_softmax cumsum cumprod logcumsumexp sort argsort topk flip roll "
    "index_select"
)
_PLACES = (
    "max_pool{0} max_pool{0}_with_indices avg_pool{0} adaptive_avg_pool{0} _adaptive_avg_pool{0} "
    "adaptive_max_pool{0}"
)
_RESAMPLED = (
    "upsample_linear1d upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d _upsample_bilinear2d_aa "
    "_upsample_bicubic2d_aa upsample_nearest1d upsample_nearest2d upsample_nearest3d "
    "_upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d "
    "reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d replication_pad3d"
)
# PyTorch could split these further, into steps that say less.
_OPAQUE = "linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution item"

RULES: dict[str, ops.Rule] = {
    **dict.fromkeys(_ELEMENTWISE.split(), ops.elementwise),
    **dict.fromkeys(_LIKE.split(), ops.like),
    **dict.fromkeys(_REDUCE.split(), ops.reduce),
    **dict.fromkeys(_ALONG.split(), ops.along),
    **{name: ops.over_positions for k in (1, 2, 3) for name in _PLACES.format(f"{k}d").split()},
    **dict.fromkeys(_RESAMPLED.split(), ops.over_positions),
    **dict.fromkeys(_OPAQUE.split(), ops.opaque),
    **dict.fromkeys(("view", "reshape", "_unsafe_view"), ops.view),
    **dict.fromkeys(("layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm"), ops.normalise_last),
    **dict.fromkeys(("group_norm", "native_group_norm"), ops.normalise_groups),
    **dict.fromkeys(("batch_norm", "native_batch_norm", "instance_norm"), ops.normalise_each),
    **dict.fromkeys(("matmul", "mm", "bmm"), ops.product),
    **dict.fromkeys(("channel_shuffle", "native_channel_shuffle"), ops.channel_shuffle),
    **dict.fromkeys(("split", "split_with_sizes", "chunk"), ops.split),
    **dict.fromkeys(("transpose", "t"), ops.transpose),
    "scaled_dot_product_attention": ops.attention,
    "permute": ops.permute,
    "squeeze": ops.squeeze,
    "unsqueeze": ops.unsqueeze,
    "expand": ops.expand,
    "select": ops.select,
    "slice": ops.slice_,
    "unbind": ops.unbind,
    "cat": ops.cat,
    "stack": ops.stack,
    "pad": ops.pad,
    "constant_pad_nd": ops.pad,
    "glu": ops.gated,
    "pixel_shuffle": ops.pixel_shuffle,
    "pixel_unshuffle": ops.pixel_unshuffle,
    "index": ops.indexed,
}


def name_of(func: Any) -> str:
    """``relu`` for ``aten.relu_.default``."""
    return str(func._schema.name).split("::")[1].removesuffix("_")


def rule_for(func: Any) -> ops.Rule | None:
    """The rule of an operation, None when there is none."""
    if str(func._schema.name).startswith("aten::"):
        rule = RULES.get(name_of(func))
        if rule is not None:
            return rule
        if torch.Tag.pointwise in func.tags:
            return ops.elementwise
    return None


def arguments(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments by name, defaults included."""
    named = {}
    for i, argument in enumerate(func._schema.arguments):
        value = args[i] if i < len(args) else kwargs.get(argument.name, argument.default_value)
        named[argument.name] = value
    return named
