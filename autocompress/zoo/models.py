"""Networks by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

from autocompress.core.errors import RecipeError
from autocompress.core.wording import did_you_mean
from autocompress.zoo.chains import cnv, mobilenet_v1, mobilenet_v2, vgg
from autocompress.zoo.own import call_factory
from autocompress.zoo.resnet import ResNet

_VGG16 = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M")
# Howard et al., arXiv 1704.04861, table 1: output channels and stride.
_MOBILENET_V1 = (
    (64, 1),
    (128, 2),
    (128, 1),
    (256, 2),
    (256, 1),
    (512, 2),
    *((512, 1),) * 5,
    (1024, 2),
    (1024, 1),
)

MODELS: dict[str, Callable[..., nn.Module]] = {
    "vgg16": partial(vgg, _VGG16),
    "cnv": cnv,
    "mobilenet_v1": partial(mobilenet_v1, _MOBILENET_V1, stem=32),
    "mobilenet_v2": mobilenet_v2,
    "resnet20": partial(ResNet, 20, shortcut="pad"),
    "resnet32": partial(ResNet, 32, shortcut="pad"),
    "resnet56": partial(ResNet, 56, shortcut="pad"),
    "resnet20_b": partial(ResNet, 20, shortcut="conv", head="fc"),
    "plain20": partial(ResNet, 20, shortcut="none"),
    "digits_vgg": partial(vgg, (16, 16, "M", 32, 32, "M", 64)),
    "digits_mobilenet": partial(mobilenet_v1, ((64, 1), (128, 2), (128, 1), (128, 2)), stem=32),
}

_TORCHVISION = "torchvision:"
# Their training output is a tuple with auxiliary logits unless these are switched off.
_WITH_AUXILIARY = ("googlenet", "inception_v3")


def build(name: str, *, num_classes: int, in_channels: int = 3) -> nn.Module:
    """A network with fresh weights, drawn from torch's global generator.

    Args:
        name: a key of :data:`MODELS`, ``torchvision:NAME`` for a torchvision classifier, or
            ``pkg.mod:factory`` for your own; a factory gets ``num_classes`` and ``in_channels`` if it accepts
            them.
        num_classes: number of outputs.
        in_channels: channels of the images.

    Raises:
        RecipeError: the name is unknown, or the network cannot be built like this.
    """
    faults = [
        f"{key} must be >= 1, got {value}"
        for key, value in (("num_classes", num_classes), ("in_channels", in_channels))
        if value < 1
    ]
    if faults:
        raise RecipeError(faults)
    if name in MODELS:
        return MODELS[name](num_classes=num_classes, in_channels=in_channels)
    if name.startswith(_TORCHVISION):
        return _from_torchvision(name.removeprefix(_TORCHVISION), num_classes, in_channels)
    if ":" in name:
        model = call_factory(name, num_classes=num_classes, in_channels=in_channels)
        if not isinstance(model, nn.Module):
            raise RecipeError(f"{name!r} must return a torch.nn.Module, got {type(model).__name__}")
        return model
    raise RecipeError(
        f"unknown model {name!r}{did_you_mean(name, MODELS)}; known: {', '.join(MODELS)}, "
        "torchvision:NAME, or pkg.mod:factory for your own"
    )


def _from_torchvision(name: str, num_classes: int, in_channels: int) -> nn.Module:
    import torchvision

    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise RecipeError(
            f"torchvision has no classifier {name!r}{did_you_mean(name, known)}; "
            "torchvision.models.list_models() lists them"
        )
    if in_channels != 3:
        raise RecipeError(
            f"{_TORCHVISION}{name} takes 3 input channels, got {in_channels}; "
            "write a factory and name it as pkg.mod:factory"
        )
    extra = {"aux_logits": False, "init_weights": True} if name in _WITH_AUXILIARY else {}
    model: nn.Module = torchvision.models.get_model(name, weights=None, num_classes=num_classes, **extra)
    return model
