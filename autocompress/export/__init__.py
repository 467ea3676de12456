"""ONNX files, their agreement with PyTorch, and their speed; the only door to onnx and ONNX Runtime.

Importing this package loads neither; the functions do.
"""

from autocompress.export.latency import Latency, measure_latency
from autocompress.export.onnx_file import check_opset, export_onnx
from autocompress.export.parity import Parity, check_parity
from autocompress.export.qcdq_file import count_int8, export_qcdq
from autocompress.export.quantised_parity import QuantisedParity, check_quantised_parity

__all__ = [
    "Latency",
    "Parity",
    "QuantisedParity",
    "check_opset",
    "check_parity",
    "check_quantised_parity",
    "count_int8",
    "export_onnx",
    "export_qcdq",
    "measure_latency",
]
