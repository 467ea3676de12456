"""Cost models: a graph in, a cost out. Needs no torch."""

from autocompress.hardware_sim.macs import MacsModel
from autocompress.hardware_sim.model import HardwareModel, LayerCosts, UnsupportedLayerError
from autocompress.hardware_sim.table import LayerTable

__all__ = ["HardwareModel", "LayerCosts", "LayerTable", "MacsModel", "UnsupportedLayerError"]
