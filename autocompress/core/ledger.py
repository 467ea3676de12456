"""Every evaluated plan, written at once, so that a killed search can be fast-forwarded."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType

from autocompress.core.errors import RunDirectoryError
from autocompress.core.plan import Plan
from autocompress.core.problem import Problem, Scored

_SCHEMA = """
CREATE TABLE IF NOT EXISTS evaluations (
    problem TEXT NOT NULL, plan TEXT NOT NULL, plan_json TEXT NOT NULL,
    score REAL NOT NULL, cost_json TEXT NOT NULL, seconds REAL NOT NULL,
    PRIMARY KEY (problem, plan)
) WITHOUT ROWID
"""


@dataclass(frozen=True)
class Entry:
    """One row: a plan, its score, its cost totals and what the evaluation took."""

    plan: Plan
    score: float
    cost: dict[str, float]
    seconds: float


class Ledger:
    """SQLite file (WAL mode) of evaluated plans, keyed by problem and plan digest.

    Args:
        path: the file; created with its table when absent. ``:memory:`` keeps it in memory.

    Raises:
        RunDirectoryError: the file is not a ledger or cannot be written.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = path
        try:
            self._db = sqlite3.connect(path, timeout=30.0)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute(_SCHEMA)
            self._db.commit()
        except sqlite3.Error as fault:
            raise RunDirectoryError(f"cannot open the ledger {path}: {fault}") from fault

    def get(self, problem: Problem, plan: Plan) -> Entry | None:
        """The stored evaluation of a plan, or None."""
        row = self._db.execute(
            "SELECT plan_json, score, cost_json, seconds FROM evaluations WHERE problem=? AND plan=?",
            (problem.digest, plan.digest),
        ).fetchone()
        return _entry(row) if row else None

    def put(self, problem: Problem, entry: Entry) -> None:
        """Store an evaluation; it is on disk when this returns.

        Raises:
            RunDirectoryError: the disk is full or the file was taken away; earlier rows stay intact.
        """
        values = (problem.digest, entry.plan.digest, entry.plan.to_json(), entry.score)
        try:
            with self._db:
                self._db.execute(
                    "INSERT OR REPLACE INTO evaluations VALUES (?, ?, ?, ?, ?, ?)",
                    (*values, json.dumps(entry.cost, sort_keys=True), entry.seconds),
                )
        except sqlite3.Error as fault:
            raise RunDirectoryError(
                f"cannot write to the ledger {self.path}: {fault}. Free some space and resume the run."
            ) from fault

    def entries(self, problem: Problem | None = None) -> list[Entry]:
        """All rows, or those of one problem, ordered by plan digest."""
        where, args = ("WHERE problem=?", (problem.digest,)) if problem else ("", ())
        rows = self._db.execute(
            f"SELECT plan_json, score, cost_json, seconds FROM evaluations {where} ORDER BY problem, plan",
            args,
        )
        return [_entry(row) for row in rows]

    def in_front_of(self, problem: Problem) -> Problem:
        """The same problem, with every evaluation looked up here first and recorded here after.

        Running a search again on the returned problem fast-forwards through what was already paid for.
        """

        def evaluate(plan: Plan) -> float:
            known = self.get(problem, plan)
            if known is not None:
                return known.score
            scored = problem.score(plan)
            self._record(problem, plan, scored)
            return scored.score

        def evaluate_many(plans: Sequence[Plan]) -> Iterator[Scored]:
            known = {plan: entry.score for plan in plans if (entry := self.get(problem, plan)) is not None}
            missing = [plan for plan in dict.fromkeys(plans) if plan not in known]
            fresh = problem.score_many(missing)
            for plan in plans:
                seconds = 0.0
                if plan not in known:  # the next of the missing ones: they are in the same order
                    scored = next(fresh)
                    self._record(problem, plan, scored)
                    known[plan], seconds = scored
                yield Scored(known[plan], seconds)

        return replace(
            problem, evaluate=evaluate, evaluate_many=evaluate_many if problem.evaluate_many else None
        )

    def _record(self, problem: Problem, plan: Plan, scored: Scored) -> None:
        totals = {str(k): float(v) for k, v in problem.price(plan).totals.items()}
        self.put(problem, Entry(plan, scored.score, totals, scored.seconds))

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _entry(row: tuple[str, float, str, float]) -> Entry:
    return Entry(Plan.from_json(row[0]), row[1], json.loads(row[2]), row[3])
