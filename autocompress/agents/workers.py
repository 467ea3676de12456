"""Plans scored by worker processes, with the results of one process.

``evaluate`` is pickled once and sent to every worker when it starts; what a plan then needs on its way is a
few hundred bytes. Workers are spawned, not forked: a fork of a process with PyTorch's threads may hang. They
compute with as many threads as this process, since the number changes the last bits of a score. So with two
threads and eight workers there is work for sixteen cores.

A script that uses workers must guard its entry with ``if __name__ == "__main__"``, as everywhere in Python's
``multiprocessing``.
"""

from __future__ import annotations

import multiprocessing
import pickle
import signal
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from typing import Any

import cloudpickle

from autocompress.core import Plan, Problem, Scored
from autocompress.core.errors import WorkerError

MOST_TRIES = 3
"""Workers that a plan may bring down before it is given up."""
_SPAWN = multiprocessing.get_context("spawn")
_GRACE = 5.0  # seconds for a worker to end before it is killed
Task = tuple[int, int]
"""Running number of a batch, and a plan's place in it."""


@dataclass(frozen=True)
class Workers:
    """Who scores plans.

    Args:
        count: processes; None for one, which is this process, or with Ray for as many as it has cores.
        ray_address: of a Ray cluster, ``auto`` for the one of this machine, or ``local`` to start one here;
            needs the extra ``ray``. None for processes on this machine without Ray.

    Raises:
        WorkerError: fewer than one.
    """

    count: int | None = None
    ray_address: str | None = None

    def __post_init__(self) -> None:
        if self.count is not None and self.count < 1:
            raise WorkerError(f"the number of workers must be >= 1, got {self.count}")


ALONE = Workers()
"""This process does everything."""


@contextmanager
def evaluated_by(problem: Problem, workers: Workers) -> Iterator[Problem]:
    """The same problem; what searches ask for in batches is scored by worker processes.

    Scores and their order do not depend on the number of workers. A worker that is killed costs the
    evaluation it was at, which another one repeats.

    Args:
        problem: ``evaluate`` must be picklable by cloudpickle, which nearly everything is.
        workers: where.

    Raises:
        WorkerError: ``evaluate`` cannot be sent, Ray is missing or not there, or, while plans are scored,
            a plan brought down three workers.
    """
    if workers.ray_address is not None:
        from autocompress.agents.ray_workers import ray_workers

        payload = payload_of(problem)
        with ray_workers(payload, address=workers.ray_address, most=workers.count) as evaluate_many:
            yield replace(problem, evaluate_many=evaluate_many)
    elif workers.count is None or workers.count == 1:
        yield problem
    else:
        crew = _Crew(payload_of(problem), workers.count)
        try:
            yield replace(problem, evaluate_many=crew.scores_of)
        finally:
            crew.close()


def payload_of(problem: Problem) -> bytes:
    """What a worker needs to score plans.

    Raises:
        WorkerError: it cannot be pickled.
    """
    torch: Any = sys.modules.get("torch")  # what has not loaded it needs no threads of it
    try:
        return bytes(cloudpickle.dumps((torch and torch.get_num_threads(), problem.evaluate)))
    except Exception as fault:
        raise WorkerError(
            f"what scores plans cannot be sent to worker processes: {fault}. Use one worker, or make it "
            "picklable."
        ) from fault


def loaded(payload: bytes) -> Callable[[Plan], float]:
    """What scores plans, in the worker's process.

    Raises:
        WorkerError: it cannot be unpickled there.
    """
    try:
        num_threads, evaluate = pickle.loads(payload)
    except Exception as fault:
        raise WorkerError(f"what scores plans cannot be read in a worker process: {fault!r}") from fault
    if num_threads:
        import torch

        torch.set_num_threads(num_threads)
    score: Callable[[Plan], float] = evaluate
    return score


def timed(evaluate: Callable[[Plan], float], plan: Plan) -> Scored:
    """A plan's score and its seconds."""
    start = time.perf_counter()
    score = float(evaluate(plan))
    return Scored(score, time.perf_counter() - start)


def brought_down(plan: Plan, how: str) -> WorkerError:
    """What to say of a plan that no worker survives."""
    return WorkerError(
        f"plan {plan.digest} brought down {MOST_TRIES} workers in a row ({how}). When memory is short, use "
        "fewer workers."
    )


def _work(connection: Connection, payload: bytes) -> None:
    """The life of a worker: plans come, scores go, until the other end is closed."""
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches all processes; the first one ends the others
    evaluate: Callable[[Plan], float] | None = None
    while True:
        try:
            plan = connection.recv()
            try:
                evaluate = evaluate or loaded(payload)
                answer: Any = timed(evaluate, plan)
            except Exception as fault:
                answer = _portable(fault)
            connection.send(answer)
        except (EOFError, OSError):
            return


def _portable(fault: Exception) -> Exception:
    """The fault, or its text where it does not survive the way."""
    try:
        pickle.loads(pickle.dumps(fault))
    except Exception:
        return WorkerError(f"{type(fault).__name__}: {fault}")
    return fault


class _Worker:
    """One process and what it is at."""

    def __init__(self, payload: bytes) -> None:
        self.connection, theirs = _SPAWN.Pipe()
        self.process = _SPAWN.Process(target=_work, args=(theirs, payload), daemon=True)
        self.process.start()
        theirs.close()  # so that this end sees the worker's death
        self.task: Task | None = None

    def dismiss(self) -> str:
        """End it; returns how it ended, in words."""
        self.connection.close()
        self.process.join(0 if self.task else _GRACE)
        if self.process.is_alive():
            self.process.terminate()
            self.process.join(_GRACE)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        code = self.process.exitcode or 0
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"


class _Crew:
    """Workers that share batches of plans."""

    def __init__(self, payload: bytes, num_workers: int) -> None:
        self._payload = payload
        self._workers = [_Worker(payload) for _ in range(num_workers)]
        self._batch = 0

    def scores_of(self, plans: Sequence[Plan]) -> Iterator[Scored]:
        """Scores in the order of the plans; a plan's fault is raised when its turn comes."""
        self._batch += 1
        waiting, falls = deque(range(len(plans))), Counter[int]()
        answers: dict[int, Any] = {}
        for place in range(len(plans)):
            while place not in answers:
                self._hand_out(plans, waiting)
                for fallen, how in self._collect(answers):
                    falls[fallen] += 1
                    if falls[fallen] < MOST_TRIES:
                        waiting.appendleft(fallen)
                    else:
                        answers[fallen] = brought_down(plans[fallen], how)
            answer = answers.pop(place)
            if isinstance(answer, BaseException):
                raise answer
            yield answer

    def _hand_out(self, plans: Sequence[Plan], waiting: deque[int]) -> None:
        """Give every idle worker a plan."""
        for number in range(len(self._workers)):
            if not waiting:
                return
            if self._workers[number].task is not None:
                continue
            if not self._workers[number].process.is_alive():  # killed while it had nothing to do
                self._workers[number].dismiss()
                self._workers[number] = _Worker(self._payload)
            worker, place = self._workers[number], waiting.popleft()
            worker.task = (self._batch, place)
            try:
                worker.connection.send(plans[place])
            except OSError:
                continue  # it died just now; collecting will tell

    def _collect(self, answers: dict[int, Any]) -> list[tuple[int, str]]:
        """Wait for at least one worker; returns the places of plans whose workers died, and how."""
        busy = {worker.connection: number for number, worker in enumerate(self._workers) if worker.task}
        fallen = []
        for connection in wait(list(busy)):
            number = busy[connection]  # type: ignore[index]
            worker = self._workers[number]
            assert worker.task is not None  # for the type checker: the busy ones have
            batch, place = worker.task
            try:
                answer = worker.connection.recv()
                worker.task = None
            except (EOFError, OSError):
                how = worker.dismiss()
                self._workers[number] = _Worker(self._payload)
                if batch == self._batch:
                    fallen.append((place, how))
                continue
            if batch == self._batch:  # else it answers for a batch that was given up
                answers[place] = answer
        return fallen

    def close(self) -> None:
        """End all workers."""
        for worker in self._workers:
            worker.dismiss()
