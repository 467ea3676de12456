"""Files for other tools, their agreement with PyTorch, and their speed; the only door to onnx.

Importing this package loads none of them; the functions do.
"""

from autocompress.export.bit_json import describe_bits, write_bit_json
from autocompress.export.finn_folding_file import StageFold, write_finn_files
from autocompress.export.hls4ml_project import check_hls4ml_parity, convert_with_hls4ml
from autocompress.export.latency import Latency, measure_latency
from autocompress.export.onnx_file import check_opset, export_onnx
from autocompress.export.packed_file import (
    CodebookWeight,
    GridWeight,
    packed_weights,
    read_packed,
    write_packed,
)
from autocompress.export.parity import Parity, check_parity
from autocompress.export.qcdq_file import count_int8, export_qcdq
from autocompress.export.qonnx_file import export_qonnx
from autocompress.export.qonnx_parity import QonnxParity, check_qonnx_parity
from autocompress.export.quantised_parity import QuantisedParity, check_quantised_parity
from autocompress.export.static_int8 import export_static_int8

__all__ = [
    "CodebookWeight",
    "GridWeight",
    "Latency",
    "Parity",
    "QonnxParity",
    "QuantisedParity",
    "StageFold",
    "check_hls4ml_parity",
    "check_opset",
    "check_parity",
    "check_qonnx_parity",
    "check_quantised_parity",
    "convert_with_hls4ml",
    "count_int8",
    "describe_bits",
    "export_onnx",
    "export_qcdq",
    "export_qonnx",
    "export_static_int8",
    "measure_latency",
    "packed_weights",
    "read_packed",
    "write_bit_json",
    "write_finn_files",
    "write_packed",
]
