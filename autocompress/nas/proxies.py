"""Scores of untrained networks from one batch: how far they rank networks is shown beside their size.

Abdelfattah et al., "Zero-Cost Proxies for Lightweight NAS", arXiv 2101.08134, and its released code, for all
but ``naswot`` and ``zen``. Each function leaves the network as it was. Higher is meant to be better.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from autocompress.trace import measure

Proxy = Callable[[nn.Module, Tensor, Tensor], float]
"""(network, images (N, C, H, W), labels (N,)) -> score."""
_LAYERS = (nn.Conv2d, nn.Linear)
_WORST = -math.inf


def synflow(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Sum over layers of ``|w * dR/dw|``, R the output for ones with all weights made positive.

    Tanaka et al., arXiv 2006.05467. In evaluation mode with fresh statistics BatchNorm does next to nothing;
    it is taken out here. In double precision, since products over many layers leave single precision.
    """
    network = copy.deepcopy(model).double().eval()
    _without_batchnorm(network)
    with torch.no_grad():
        for tensor in network.state_dict().values():
            tensor.abs_()
    network.zero_grad()
    network(torch.ones_like(images[:1], dtype=torch.float64)).sum().backward()
    return _finite(sum(float((w.detach() * _gradient(w)).abs().sum()) for w in _weights(network)))


def snip(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Sum over layers of ``|w * dL/dw|``, L the cross-entropy of one batch. Lee et al., arXiv 1810.02340."""
    with _trained_once(model, images, labels) as network:
        return _finite(sum(float((w.detach() * _gradient(w)).abs().sum()) for w in _weights(network)))


def grad_norm(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Sum over layers of the norm of the cross-entropy's gradient by the weights."""
    with _trained_once(model, images, labels) as network:
        return _finite(sum(float(_gradient(w).norm()) for w in _weights(network)))


def grasp(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Minus the sum over layers of ``w * Hg``, H and g the Hessian and gradient of one batch's cross-entropy.

    Wang et al., arXiv 2002.07376. The sign is that of the released code of Abdelfattah et al.
    """
    network = copy.deepcopy(model).train()
    weights = _weights(network)
    loss = F.cross_entropy(network(images), labels)
    found = torch.autograd.grad(loss, weights, create_graph=True, allow_unused=True)
    used = [(w, g) for w, g in zip(weights, found, strict=True) if g is not None]
    along = torch.stack([(g * g.detach()).sum() for _, g in used]).sum()
    products = torch.autograd.grad(along, [w for w, _ in used], allow_unused=True)
    pairs = zip((w for w, _ in used), products, strict=True)
    return _finite(-sum(float((w.detach() * p).sum()) for w, p in pairs if p is not None))


def fisher(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Sum over weights of ``0.5 * mean_n (sum_hw a * dL/da)^2`` of the output channel a that each belongs to.

    Theis et al., arXiv 1801.05787; Turner et al., arXiv 1906.04113, who score channels. A network's score
    counts a channel once for each of its weights, as in the released code of Abdelfattah et al.: counted once
    each, the score ranks NAS-Bench-201's cells worse than published.
    """
    outputs: list[tuple[int, Tensor]] = []

    def keep(module: nn.Module, args: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.retain_grad()
            outputs.append((cast("Tensor", module.weight)[0].numel(), output))

    def hook(network: nn.Module) -> None:
        for module in network.modules():
            if isinstance(module, _LAYERS):
                module.register_forward_hook(keep)

    with _trained_once(model, images, labels, prepare=hook):
        scores = []
        for num_weights, a in outputs:
            if a.grad is not None:
                products = (a.detach() * a.grad).flatten(2).sum(2) if a.ndim > 2 else a.detach() * a.grad
                scores.append(0.5 * num_weights * float((products**2).mean(0).sum()))
    return _finite(sum(scores))


def jacob_cov(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """How differently the network reacts to different images: from the correlation of input gradients.

    ``-sum(log(v + k) + 1 / (v + k))`` over the eigenvalues v of the correlation matrix of the images'
    gradients of the summed logits, k = 1e-5. Mellor et al., arXiv 2006.04647v1.
    """
    network = copy.deepcopy(model).train()
    x = images.clone().requires_grad_(True)
    (gradients,) = torch.autograd.grad(network(x).sum(), x)
    rows = gradients.flatten(1).double()
    if not bool(torch.isfinite(rows).all()) or bool((rows.std(1) == 0).any()):
        return _WORST
    values = torch.linalg.eigvalsh(torch.corrcoef(rows)).clamp(min=0) + 1e-5
    return -float((values.log() + 1 / values).sum())


def naswot(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """``log |det K|`` of the kernel that counts, over all ReLUs, where two images have the same sign.

    Mellor et al., arXiv 2006.04647v3, section 3. Minus infinity where two images have the same pattern.
    """
    network = copy.deepcopy(model).train()
    kernel = torch.zeros(len(images), len(images), dtype=torch.float64)

    def count(module: nn.Module, args: Any, output: Tensor) -> None:
        x = (output.detach() > 0).flatten(1).double()
        kernel.add_((x @ x.T + (1 - x) @ (1 - x).T).cpu())

    for module in network.modules():
        if isinstance(module, (nn.ReLU, nn.ReLU6)):
            module.register_forward_hook(count)
    with torch.no_grad():
        network(images)
    sign, logarithm = torch.linalg.slogdet(kernel)
    # Equal rows make it singular; rounding can leave a tiny determinant in their place.
    singular = float(sign) <= 0 or len(torch.unique(kernel, dim=0)) < len(kernel)
    return _WORST if singular else float(logarithm)


def zen(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """``log E|f(x) - f(x + 0.01 e)| + sum over BatchNorms of log sqrt(mean variance)`` for normal noise x, e.

    Lin et al., Zen-NAS, arXiv 2102.01063, algorithm 1. Weights are drawn anew from N(0, 1), as there; f ends
    before the classifier. Differs from the paper in a single draw.
    """
    network = copy.deepcopy(model).train()
    generator = torch.Generator().manual_seed(0)
    layers = [m for m in network.modules() if isinstance(m, _LAYERS)]
    features: list[Tensor] = []
    with torch.no_grad():
        for layer in layers:
            noise = torch.randn(layer.weight.shape, generator=generator)
            layer.weight.copy_(noise)
        for module in network.modules():
            if isinstance(module, _BatchNorm) and module.affine:
                module.weight.fill_(1.0)
                module.bias.zero_()
        variances: list[Tensor] = []

        def note(module: nn.Module, args: Any, output: Tensor) -> None:
            variances.append(args[0].detach().var((0, *range(2, args[0].ndim))).mean())

        layers[-1].register_forward_pre_hook(lambda module, args: features.append(args[0].detach()))
        handles = [m.register_forward_hook(note) for m in network.modules() if isinstance(m, _BatchNorm)]
        x = torch.randn(images.shape, generator=generator).to(images)
        network(x)
        for handle in handles:
            handle.remove()
        network(x + 0.01 * torch.randn(images.shape, generator=generator).to(images))
    distance = float((features[0] - features[1]).abs().sum(1).mean())
    if distance <= 0 or any(float(v) <= 0 for v in variances):
        return _WORST
    return _finite(math.log(distance) + sum(0.5 * math.log(float(v)) for v in variances))


def num_params(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The number of parameters: what a proxy has to beat."""
    return float(sum(p.numel() for p in model.parameters()))


def num_macs(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The number of MACs of one sample: what a proxy has to beat."""
    return float(measure(model, tuple(images.shape[1:]))["macs"])


PROXIES: dict[str, Proxy] = {
    "synflow": synflow,
    "jacob_cov": jacob_cov,
    "snip": snip,
    "grad_norm": grad_norm,
    "grasp": grasp,
    "fisher": fisher,
    "naswot": naswot,
    "zen": zen,
    "params": num_params,
    "macs": num_macs,
}


@contextmanager
def _trained_once(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    prepare: Callable[[nn.Module], None] = lambda network: None,
) -> Iterator[nn.Module]:
    """A copy with the gradients of the cross-entropy of one batch."""
    network = copy.deepcopy(model).train()
    prepare(network)
    network.zero_grad()
    F.cross_entropy(network(images), labels).backward()  # type: ignore[no-untyped-call]
    yield network


def _weights(network: nn.Module) -> list[Tensor]:
    return [module.weight for module in network.modules() if isinstance(module, _LAYERS)]


def _gradient(weight: Tensor) -> Tensor:
    return torch.zeros_like(weight) if weight.grad is None else weight.grad


def _finite(score: float) -> float:
    return score if math.isfinite(score) else _WORST


def _without_batchnorm(network: nn.Module) -> None:
    for name, module in list(network.named_modules()):
        if isinstance(module, _BatchNorm):
            network.set_submodule(name, nn.Identity())
