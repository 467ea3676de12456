"""Zero-padding of the channel axis, which torch-pruning takes for an element-wise operation.

The parameter-free shortcuts of CIFAR ResNets (He et al., CVPR 2016, option A) pad channels on both sides: the
channels shift, and their number grows. Both facts are added to a finished dependency graph here.
"""

from __future__ import annotations

from typing import Any

CHANNEL_PAD = 6
"""Length of a padding of an image batch that reaches the channel axis: two numbers per axis, last first."""


def map_channel_padding(dependency: Any) -> None:
    """Teach a torch-pruning dependency graph the channel paddings in it; without any, nothing changes."""
    from torch_pruning import ops
    from torch_pruning.dependency.index_mapping import _ConcatIndexMapping
    from torch_pruning.dependency.shape_infer import infer_out_channels_recursively

    class Pad(ops._ElementWiseOp):  # type: ignore[misc]
        """A padding node that knows how many channels go in and come out."""

    class PadPruner(ops.DummyPruner):  # type: ignore[misc]
        def get_in_channels(self, layer: Any) -> int:
            return int(infer_out_channels_recursively(dependency, layer.source, [0]))

        def get_out_channels(self, layer: Any) -> int:
            return self.get_in_channels(layer) + int(sum(layer.pad))

    paddings = [node for node in dependency.module2node.values() if _channel_pad(node.grad_fn)]
    if not paddings:
        return
    pruner = PadPruner()
    dependency.register_customized_layer(Pad, pruner)
    for node in paddings:
        node.module.__class__ = Pad
        node.module.source, node.module.pad = node.inputs[0], _channel_pad(node.grad_fn)
    for node in paddings:
        source, first = node.module.source, node.module.pad[0]
        place = (first, first + pruner.get_in_channels(node.module))
        _set_mapping(source, node, _ConcatIndexMapping(place, reverse=False))
        _set_mapping(node, source, _ConcatIndexMapping(place, reverse=True))
    # Flattenings were mapped with the number of channels before the padding; they are mapped anew on use.
    for node in dependency.module2node.values():
        if node.type == ops.OPTYPE.RESHAPE:
            for neighbour in (*node.inputs, *node.outputs):
                _set_mapping(node, neighbour, None)
                _set_mapping(neighbour, node, None)


def _channel_pad(grad_fn: Any) -> tuple[int, int] | None:
    """Channels added in front and behind by a padding operation, or None."""
    pad: tuple[int, ...] = getattr(grad_fn, "_saved_pad", ())
    if len(pad) != CHANNEL_PAD or "ConstantPad" not in grad_fn.name() or not any(pad[4:]):
        return None
    return int(pad[4]), int(pad[5])


def _set_mapping(start: Any, end: Any, mapping: Any) -> None:
    for step in start.dependencies:
        if step.target is end:
            step.index_mapping[0] = mapping
