"""Quantisation: grids, calibration, the fast network of a search, and the Brevitas network of training.

Importing this package loads no Brevitas; :func:`quantize` does.
"""

from autocompress.quant.brevitas_network import quantize
from autocompress.quant.calibration import Calibration, QuantSettings
from autocompress.quant.grids import Grid
from autocompress.quant.kmeans import (
    Codebook,
    CodebookTables,
    make_codebook,
    share_weights,
    trained_codebooks,
)
from autocompress.quant.knobs import BIT_CHOICES, bit_knobs, reference_bits
from autocompress.quant.ranges import RANGE_METHODS, RangeMethod, clip_thresholds
from autocompress.quant.skeleton import INNER_BITS, Skeleton
from autocompress.quant.tables import QuantTables

__all__ = [
    "BIT_CHOICES",
    "INNER_BITS",
    "RANGE_METHODS",
    "Calibration",
    "Codebook",
    "CodebookTables",
    "Grid",
    "QuantSettings",
    "QuantTables",
    "RangeMethod",
    "Skeleton",
    "bit_knobs",
    "clip_thresholds",
    "make_codebook",
    "quantize",
    "reference_bits",
    "share_weights",
    "trained_codebooks",
]
