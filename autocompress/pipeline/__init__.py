"""Recipes, runs and reports."""

from autocompress.pipeline.architectures import Architectures
from autocompress.pipeline.estimate import Estimate, estimate
from autocompress.pipeline.prepare import Prepared, prepare
from autocompress.pipeline.problems import Candidate, problems_of
from autocompress.pipeline.progress import Event, OnEvent
from autocompress.pipeline.recipe import Recipe, bundled_recipes, find_recipe
from autocompress.pipeline.report import write_report
from autocompress.pipeline.run import compress, load_compressed, recipe_threads, resume, run_recipe

__all__ = [
    "Architectures",
    "Candidate",
    "Estimate",
    "Event",
    "OnEvent",
    "Prepared",
    "Recipe",
    "bundled_recipes",
    "compress",
    "estimate",
    "find_recipe",
    "load_compressed",
    "prepare",
    "problems_of",
    "recipe_threads",
    "resume",
    "run_recipe",
    "write_report",
]
