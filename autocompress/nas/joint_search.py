"""Joint search with a predictor: few plans are evaluated, many are predicted, the best are evaluated."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from autocompress.core import Plan, Problem, Search, SearchResult, Trial, TrialCallback, Value
from autocompress.core.errors import RecipeError
from autocompress.core.fitting import scaled_to_budget
from autocompress.nas.evolution import ElitistEvolution
from autocompress.nas.predictor import AccuracyPredictor, PredictorSettings

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PredictorSearch:
    """APQ's search: learn to predict scores, search on predictions, evaluate what looks best.

    Of ``num_plans`` evaluations, the first ``float_share`` go to float networks: random architectures and
    channels, without bits, whatever the budgets. The next ``sample_share`` go to random plans that spend the
    budgets. A predictor fitted to the first is transferred to the second. The rest goes to the best plans of
    a search on the predictions, in ``rounds`` equal parts; after each, the predictor also learns from those.
    Trials are marked ``sample`` and ``predicted``; float networks have no part in budgets and are no trials.

    With a ``predictor`` nothing is sampled: a second target or another budget costs predictions, and
    ``num_plans`` evaluations of the best.

    Wang et al., "APQ", CVPR 2020, section 3. Differs from the paper in samples at the budgets, where the
    plans are that matter, and in several rounds.

    Args:
        predictor: learnt before on equal knobs, as by :func:`learned_predictor`; None to learn one.
        float_share, sample_share: of ``num_plans``; see above.
        rounds: how often the best are evaluated.
        num_predicted: plans whose scores are predicted in each round.
        search: that proposes them; deterministic given its seed.
        settings: of the predictor.

    Raises:
        RecipeError: values out of range, all at once.

    Example:
        >>> search = PredictorSearch(num_predicted=2000)
        >>> search.search.population
        100
    """

    predictor: AccuracyPredictor | None = None
    float_share: float = 0.2
    sample_share: float = 0.4
    rounds: int = 3
    num_predicted: int = 3000
    search: Search = field(default_factory=ElitistEvolution)
    settings: PredictorSettings = field(default_factory=PredictorSettings)

    def __post_init__(self) -> None:
        faults = []
        for name in ("float_share", "sample_share"):
            if not 0 <= getattr(self, name) < 1:
                faults.append(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if self.float_share + self.sample_share >= 1:
            faults.append(
                "float_share and sample_share must leave plans to evaluate in the end, got "
                f"{self.float_share} + {self.sample_share}"
            )
        for name in ("rounds", "num_predicted"):
            if getattr(self, name) < 1:
                faults.append(f"{name} must be >= 1, got {getattr(self, name)}")
        if faults:
            raise RecipeError([f"predictor search: {fault}" for fault in faults])

    def least_plans(self, num_knobs: int) -> int:
        """Two pairs to learn from and a plan to evaluate; one plan with a predictor."""
        return 1 if self.predictor else 8

    def __call__(
        self, problem: Problem, *, num_plans: int, seed: int, callbacks: Sequence[TrialCallback] = ()
    ) -> SearchResult:
        """Evaluate at most ``num_plans`` plans, float networks included; see ``core.Search``.

        Raises:
            InfeasibleBudgetError: no plan meets the budgets.
            ValueError: ``num_plans`` is below 8, or 1 with a predictor, or the predictor has other knobs.
            DivergenceError: scores or the predictor's loss are not finite.
        """
        least = self.least_plans(len(problem.knobs))
        if num_plans < least:
            raise ValueError(f"PredictorSearch needs num_plans >= {least}, got {num_plans}")
        problem.reachable()
        trials: list[Trial] = []
        left, predictor = num_plans, self.predictor
        if predictor is None:
            num_float = round(self.float_share * num_plans) if _has_both(problem) else 0
            num_samples = max(2, round(self.sample_share * num_plans))
            predictor, samples = learned_predictor(
                problem,
                num_float=num_float,
                num_samples=num_samples,
                seed=seed,
                settings=self.settings,
                callbacks=callbacks,
            )
            left, trials = num_plans - num_float - num_samples, list(samples)
        else:
            _check_knobs(predictor, problem)
        rounds = min(self.rounds, left)
        for number in range(rounds):
            if number and len(trials) > 1:
                pairs = [t.plan for t in trials], [t.score for t in trials]
                predictor = predictor.transfer(*pairs, seed=seed)
            share = left // rounds + (number < left % rounds)
            found = self._best(problem, predictor, {t.plan for t in trials}, seed=seed + number)
            assess(problem, found[:share], trials, source="predicted", callbacks=callbacks)
        return SearchResult(tuple(trials))

    def _best(
        self, problem: Problem, predictor: AccuracyPredictor, done: Collection[Plan], *, seed: int
    ) -> list[tuple[Value, ...]]:
        """Assignments that are not done yet, those with the highest predicted scores first."""
        predicted = replace(problem, evaluate=predictor, evaluate_many=predictor.score_many)
        trials = self.search(predicted, num_plans=self.num_predicted, seed=seed).trials
        plans = dict.fromkeys(trial.plan for trial in sorted(trials, key=lambda t: -t.score))
        _log.info("best of %d predicted plans: %.4f", len(trials), max(t.score for t in trials))
        return [values_of(problem, plan) for plan in plans if plan not in done]


def learned_predictor(
    problem: Problem,
    *,
    num_float: int,
    num_samples: int,
    seed: int,
    settings: PredictorSettings | None = None,
    callbacks: Sequence[TrialCallback] = (),
) -> tuple[AccuracyPredictor, tuple[Trial, ...]]:
    """A predictor for all problems with these knobs: every target, every budget.

    Args:
        problem: gives the knobs and scores plans; without budgets, samples come from the whole space.
        num_float: float networks to evaluate, without bits; below 2, samples alone are learnt from.
        num_samples: plans with bits to evaluate, moved to the problem's budgets where it has any.
        seed: of plans, weights and batches.
        settings: of the predictor.
        callbacks: called after every sample.

    Returns:
        The predictor, and the samples.

    Raises:
        InfeasibleBudgetError: no plan meets the budgets.
        RecipeError: fewer than two samples.
        DivergenceError: scores or the predictor's loss are not finite.
    """
    problem.reachable()
    rng = np.random.default_rng([seed, 8])
    first = None
    if num_float > 1:
        plans = float_plans(problem, num_float, rng)
        scores = [scored.score for scored in problem.score_many(plans)]
        first = AccuracyPredictor.fit(problem.knobs, plans, scores, seed=seed, settings=settings)
    trials: list[Trial] = []
    wishes = rng.uniform(size=(num_samples, len(problem.knobs))).tolist()
    values = [scaled_to_budget(problem, wish) for wish in wishes]
    assess(problem, values, trials, source="sample", callbacks=callbacks)
    pairs = [t.plan for t in trials], [t.score for t in trials]
    if first is not None:
        return first.transfer(*pairs, seed=seed), tuple(trials)
    predictor = AccuracyPredictor.fit(problem.knobs, *pairs, seed=seed, with_bits=True, settings=settings)
    return predictor, tuple(trials)


def assess(
    problem: Problem,
    assignments: Sequence[Sequence[Value]],
    trials: list[Trial],
    *,
    source: str,
    callbacks: Sequence[TrialCallback] = (),
) -> None:
    """Evaluate assignments and add them to the trials."""
    for trial in problem.assess_many(assignments, index=len(trials), source=source):
        trials.append(trial)
        for callback in callbacks:
            callback(trial)


def float_plans(problem: Problem, number: int, rng: np.random.Generator) -> list[Plan]:
    """Random architectures and channels of a problem, without bits, whatever its budgets."""
    draws = (problem.plan([_drawn(k.choices, rng) for k in problem.knobs]) for _ in range(number))
    return [Plan(plan.arch, plan.channels) for plan in draws]


def values_of(problem: Problem, plan: Plan) -> tuple[Value, ...]:
    """The assignment of a problem's plan; knobs of what the plan leaves out at their first choices."""
    look_up: dict[str, Callable[[str], Value | None]] = {"arch": plan.arch.get, "channels": plan.channels.get}
    values: list[Value] = []
    for knob in problem.knobs:
        if knob.is_bits:
            bits = plan.bits.get(knob.bit_layers[0])
            found = None if bits is None else getattr(bits, knob.kind.removesuffix("_bits"))
        else:
            found = look_up[knob.kind](knob.name)
        values.append(knob.choices[0] if found is None else found)
    return tuple(values)


def _drawn(choices: Sequence[Value], rng: np.random.Generator) -> Value:
    return choices[int(rng.integers(len(choices)))]


def _has_both(problem: Problem) -> bool:
    """Whether there are bits to decide and something else."""
    return len({knob.is_bits for knob in problem.knobs}) == 2


def _check_knobs(predictor: AccuracyPredictor, problem: Problem) -> None:
    def facts(knobs: Sequence[object]) -> list[tuple[object, ...]]:
        return [(k.kind, k.name, k.choices, k.bit_layers) for k in knobs]  # type: ignore[attr-defined]

    if facts(predictor.encoding.knobs) != facts(problem.knobs):
        raise ValueError("the predictor was learnt on other knobs; make both problems of one joint space")
