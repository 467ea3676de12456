"""Plain data and arithmetic: standard library and NumPy only."""

from autocompress.core.budget import Budget
from autocompress.core.cost import METRICS, Cost, CostModel, Metric
from autocompress.core.graph import Bits, ChannelGroup, LayerGraph, LayerSpec, Width
from autocompress.core.ledger import Entry, Ledger
from autocompress.core.plan import Plan
from autocompress.core.problem import EvaluateMany, Knob, Problem, Scored, Value
from autocompress.core.result import Result, Search, SearchResult, Trial, TrialCallback, finalists

__all__ = [
    "METRICS",
    "Bits",
    "Budget",
    "ChannelGroup",
    "Cost",
    "CostModel",
    "Entry",
    "EvaluateMany",
    "Knob",
    "LayerGraph",
    "LayerSpec",
    "Ledger",
    "Metric",
    "Plan",
    "Problem",
    "Result",
    "Scored",
    "Search",
    "SearchResult",
    "Trial",
    "TrialCallback",
    "Value",
    "Width",
    "finalists",
]
