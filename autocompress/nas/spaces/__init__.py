"""Search spaces: which networks there are, what each one costs, and the network itself."""

from autocompress.nas.spaces.costs import OperationCosts, arch_knobs, arch_problem, operation_costs
from autocompress.nas.spaces.darts import Darts
from autocompress.nas.spaces.mbconv import LAYOUTS, Layout, MBConvChain, Stage, mbconv_chain
from autocompress.nas.spaces.nasbench201 import NASBench201
from autocompress.nas.spaces.operations import Operation, Place
from autocompress.nas.spaces.space import Arch, Space

__all__ = [
    "LAYOUTS",
    "Arch",
    "Darts",
    "Layout",
    "MBConvChain",
    "NASBench201",
    "Operation",
    "OperationCosts",
    "Place",
    "Space",
    "Stage",
    "arch_knobs",
    "arch_problem",
    "mbconv_chain",
    "operation_costs",
]
