"""Cost models: a graph in, a cost out. Needs no torch."""

from autocompress.hardware_sim.macs import MacsModel
from autocompress.hardware_sim.model import HardwareModel, LayerCosts, UnsupportedLayerError, refuse
from autocompress.hardware_sim.plan_prices import PlanPricer
from autocompress.hardware_sim.table import LayerTable
from autocompress.hardware_sim.target_file import bundled_targets, load_target

__all__ = [
    "HardwareModel",
    "LayerCosts",
    "LayerTable",
    "MacsModel",
    "PlanPricer",
    "UnsupportedLayerError",
    "bundled_targets",
    "load_target",
    "refuse",
]
