"""Recipes, runs and reports."""

from autocompress.pipeline.architectures import Architectures
from autocompress.pipeline.contest import Contest, contest_of, resume_contest, run_contest
from autocompress.pipeline.contest_outcome import Outcome
from autocompress.pipeline.estimate import Estimate, estimate
from autocompress.pipeline.fidelity import measure_fidelity
from autocompress.pipeline.fidelity_outcome import Fidelity
from autocompress.pipeline.prepare import Prepared, prepare
from autocompress.pipeline.problems import Candidate, problems_of
from autocompress.pipeline.progress import Event, OnEvent
from autocompress.pipeline.recipe import Recipe, bundled_recipes, find_recipe
from autocompress.pipeline.report import write_report
from autocompress.pipeline.run import compress, load_compressed, recipe_threads, resume, run_recipe
from autocompress.pipeline.series import SeriesResult, is_series, resume_series, run_series

__all__ = [
    "Architectures",
    "Candidate",
    "Contest",
    "Estimate",
    "Event",
    "Fidelity",
    "OnEvent",
    "Outcome",
    "Prepared",
    "Recipe",
    "SeriesResult",
    "bundled_recipes",
    "compress",
    "contest_of",
    "estimate",
    "find_recipe",
    "is_series",
    "load_compressed",
    "measure_fidelity",
    "prepare",
    "problems_of",
    "recipe_threads",
    "resume",
    "resume_contest",
    "resume_series",
    "run_contest",
    "run_recipe",
    "run_series",
    "write_report",
]
