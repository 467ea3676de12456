"""Searches by gradient: one network that holds all members of a space, and a distribution over them."""

from autocompress.nas.supernet.checkpoint import load_supernet
from autocompress.nas.supernet.darts import DARTS
from autocompress.nas.supernet.expected_cost import CostTerm
from autocompress.nas.supernet.gdas import GDAS
from autocompress.nas.supernet.holdout import HoldOut
from autocompress.nas.supernet.network import Supernet
from autocompress.nas.supernet.path_score import PathScore
from autocompress.nas.supernet.proxyless import ProxylessNAS
from autocompress.nas.supernet.reports import SearchEpoch, SearchSettings
from autocompress.nas.supernet.search import SupernetResult, SupernetSearch
from autocompress.nas.supernet.step import Adam, Method, Step
from autocompress.nas.supernet.task import Classification, Task

__all__ = [
    "DARTS",
    "GDAS",
    "Adam",
    "Classification",
    "CostTerm",
    "HoldOut",
    "Method",
    "PathScore",
    "ProxylessNAS",
    "SearchEpoch",
    "SearchSettings",
    "Step",
    "Supernet",
    "SupernetResult",
    "SupernetSearch",
    "Task",
    "load_supernet",
]
