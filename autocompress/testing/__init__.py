"""Conformance checks for other people's parts, and problems whose optimum is known."""

from autocompress.testing.closed_forms import bits_problem, waterfilling_problem
from autocompress.testing.conformance import ConformanceError, check_cost_model, check_env, check_search

__all__ = [
    "ConformanceError",
    "bits_problem",
    "check_cost_model",
    "check_env",
    "check_search",
    "waterfilling_problem",
]
