"""Networks by name, and their weights on disk."""

from autocompress.zoo.models import MODELS, build
from autocompress.zoo.own import call_factory, import_object
from autocompress.zoo.tensor_file import read_safetensors, write_tensors
from autocompress.zoo.weights import load_weights, named_tensors, save_weights

__all__ = [
    "MODELS",
    "build",
    "call_factory",
    "import_object",
    "load_weights",
    "named_tensors",
    "read_safetensors",
    "save_weights",
    "write_tensors",
]
