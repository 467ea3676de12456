"""A network as a graph of operations that overwrite nothing, with BatchNorm folded into its layers."""

from __future__ import annotations

import copy
import operator

from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from autocompress.core.errors import UnsupportedModelError


def folded_graph(model: nn.Module) -> fx.GraphModule:
    """A copy of a network for inference, as an fx graph.

    Args:
        model: copied, never changed.

    Raises:
        UnsupportedModelError: the network cannot be traced symbolically.
    """
    graph_module = _symbolic(model)
    _without_writes(graph_module)
    _fold_batchnorm(graph_module)
    return graph_module


def _symbolic(model: nn.Module) -> fx.GraphModule:
    try:
        return fx.symbolic_trace(copy.deepcopy(model).eval())
    except Exception as fault:  # torch.fx raises whatever the model's code raises when it sees a proxy
        reason = str(fault).strip().splitlines() or [type(fault).__name__]
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be quantised: torch.fx cannot follow it ({reason[0][:200]}). "
            "Write the branch or loop that depends on a tensor's values so that it does not, or move it "
            "outside the network."
        ) from fault


_PURE = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
}


def _without_writes(graph_module: fx.GraphModule) -> None:
    """Replace operations that overwrite their input by those that do not; later readers read the result.

    A quantised tensor may have several readers, so none of them may write into it.
    """
    modules = dict(graph_module.named_modules())
    writers = {name for name, module in modules.items() if getattr(module, "inplace", False)}
    order = {node: place for place, node in enumerate(graph_module.graph.nodes)}
    for node, place in order.items():
        method = node.op == "call_method" and str(node.target).removesuffix("_")
        if node.op == "call_module" and node.target in writers:
            modules[str(node.target)].inplace = False
        elif node.kwargs.get("inplace"):
            node.update_kwarg("inplace", False)
        elif node.op == "call_function" and node.target in _PURE:
            node.target = _PURE[node.target]
        elif method and method != node.target and hasattr(Tensor, method):
            node.target = method
        else:
            continue
        overwritten = node.args[0]
        overwritten.replace_all_uses_with(node, delete_user_cb=lambda user, after=place: order[user] > after)
    graph_module.recompile()


def _fold_batchnorm(graph_module: fx.GraphModule) -> None:
    """Fold every BatchNorm whose only input is a layer that nothing else reads, in place."""
    modules = dict(graph_module.named_modules())
    calls: dict[str, int] = {}
    for node in graph_module.graph.nodes:
        if node.op == "call_module":
            calls[str(node.target)] = calls.get(str(node.target), 0) + 1
    for node in list(graph_module.graph.nodes):
        if node.op != "call_module" or not isinstance(modules[str(node.target)], _BatchNorm):
            continue
        before = node.args[0]
        norm = modules[str(node.target)]
        layer = modules.get(str(before.target)) if before.op == "call_module" else None
        once = calls[str(node.target)] == 1 and layer is not None and calls[str(before.target)] == 1
        if not once or len(before.users) > 1 or norm.running_mean is None:
            continue
        if isinstance(layer, (nn.Conv1d, nn.Conv2d)):
            folded: nn.Module = fuse_conv_bn_eval(layer, norm)
        elif isinstance(layer, nn.Linear):
            folded = fuse_linear_bn_eval(layer, norm)
        else:
            continue
        graph_module.set_submodule(str(before.target), folded)
        node.replace_all_uses_with(before)
        graph_module.graph.erase_node(node)
        graph_module.delete_submodule(str(node.target))
    graph_module.graph.lint()
    graph_module.recompile()
