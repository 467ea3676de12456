"""Cost models: a graph in, a cost out. Needs no torch."""

from autocompress.hardware_sim.macs import MacsModel

__all__ = ["MacsModel"]
