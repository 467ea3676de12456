"""Architecture search: spaces, searches by gradient over supernets, searches by samples, zero-cost scores."""

from __future__ import annotations

from collections.abc import Callable

from autocompress.nas.evolution import RegularizedEvolution
from autocompress.nas.proxies import PROXIES
from autocompress.nas.reinforce import ReinforceSearch
from autocompress.nas.spaces import Darts, NASBench201, Space, arch_problem, mbconv_chain, operation_costs
from autocompress.nas.supernet import (
    DARTS,
    GDAS,
    CostTerm,
    Method,
    PathScore,
    ProxylessNAS,
    SearchSettings,
    Supernet,
    SupernetSearch,
)
from autocompress.nas.te_nas import TENAS

__all__ = [
    "DARTS",
    "GDAS",
    "METHODS",
    "PROXIES",
    "SPACES",
    "TENAS",
    "CostTerm",
    "Darts",
    "NASBench201",
    "PathScore",
    "ProxylessNAS",
    "RegularizedEvolution",
    "ReinforceSearch",
    "SearchSettings",
    "Space",
    "Supernet",
    "SupernetSearch",
    "arch_problem",
    "mbconv_chain",
    "operation_costs",
]

SPACES: dict[str, Callable[[tuple[int, int, int], int], Space]] = {
    "mbconv_chain": mbconv_chain,
    "nasbench201": NASBench201,
    "darts": Darts,
}
"""Name -> function of the images' shape and the number of classes."""

METHODS: dict[str, Callable[..., Method]] = {"proxyless": ProxylessNAS, "darts": DARTS, "gdas": GDAS}
"""Name -> method of learning a supernet's distribution; all settings have defaults."""
