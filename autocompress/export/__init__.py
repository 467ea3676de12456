"""ONNX files, their agreement with PyTorch, and their speed; the only door to onnx and ONNX Runtime.

Importing this package loads neither; the functions do.
"""

from autocompress.export.latency import Latency, measure_latency
from autocompress.export.onnx_file import check_opset, export_onnx
from autocompress.export.parity import Parity, check_parity

__all__ = ["Latency", "Parity", "check_opset", "check_parity", "export_onnx", "measure_latency"]
