"""Architecture search: spaces, searches by gradient over supernets, searches by samples, zero-cost scores."""

from __future__ import annotations

from collections.abc import Callable

from autocompress.nas.elastic import ElasticSupernet
from autocompress.nas.elastic_training import fit_elastic
from autocompress.nas.evolution import ElitistEvolution, RegularizedEvolution
from autocompress.nas.joint import JointSpace, joint_chain
from autocompress.nas.joint_price import JointPricer
from autocompress.nas.joint_problem import JointProblem, joint_problem
from autocompress.nas.joint_score import JointScore, JointScoreSettings
from autocompress.nas.joint_search import PredictorSearch, learned_predictor
from autocompress.nas.predictor import AccuracyPredictor, PredictorSettings
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
    "AccuracyPredictor",
    "CostTerm",
    "Darts",
    "ElasticSupernet",
    "ElitistEvolution",
    "JointPricer",
    "JointProblem",
    "JointScore",
    "JointScoreSettings",
    "JointSpace",
    "NASBench201",
    "PathScore",
    "PredictorSearch",
    "PredictorSettings",
    "ProxylessNAS",
    "RegularizedEvolution",
    "ReinforceSearch",
    "SearchSettings",
    "Space",
    "Supernet",
    "SupernetSearch",
    "arch_problem",
    "fit_elastic",
    "joint_chain",
    "joint_problem",
    "learned_predictor",
    "mbconv_chain",
    "operation_costs",
]

SPACES: dict[str, Callable[..., Space]] = {
    "mbconv_chain": mbconv_chain,
    "nasbench201": NASBench201,
    "darts": Darts,
}
"""Name -> function of the images' shape, the number of classes, and settings that have defaults."""

METHODS: dict[str, Callable[..., Method]] = {"proxyless": ProxylessNAS, "darts": DARTS, "gdas": GDAS}
"""Name -> method of learning a supernet's distribution; all settings have defaults."""
