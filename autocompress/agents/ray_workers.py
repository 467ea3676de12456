"""Plans scored on a Ray cluster: the only door to ray, which the extra ``ray`` installs."""

from __future__ import annotations

import hashlib
import socket
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from autocompress.agents.workers import MOST_TRIES, brought_down, loaded, timed
from autocompress.core import EvaluateMany, Plan, Scored
from autocompress.core.errors import WorkerError

_PATIENCE = 10.0  # seconds for a cluster to answer


@contextmanager
def ray_workers(payload: bytes, *, address: str, most: int | None) -> Iterator[EvaluateMany]:
    """Scores plans by stateless tasks of one core each, which Ray repeats when a worker or a node is lost.

    Args:
        payload: of :func:`autocompress.agents.workers.payload_of`.
        address: of a cluster, ``auto``, or ``local`` to start one on this machine.
        most: tasks at once; None for as many as the cluster has cores.

    Raises:
        WorkerError: ray is not installed, or no cluster answers.
    """
    try:
        import ray
    except ImportError as fault:
        raise WorkerError("--ray-address needs the extra ray: pip install 'autocompress[ray]'") from fault
    ours = not ray.is_initialized()
    if ours:
        _check_reachable(address)
        try:
            ray.init(
                address=None if address == "local" else address,
                log_to_driver=False,
                logging_level="ERROR",
                include_dashboard=False if address == "local" else None,
            )
        except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as fault:
            raise WorkerError(f"no Ray cluster at {address!r}: {fault}") from fault
    try:
        at_once = most or max(int(ray.cluster_resources().get("CPU", 1)), 1)
        # Within a list, so that a worker fetches it once and not with every plan.
        stored, name = [ray.put(payload)], hashlib.sha256(payload).hexdigest()
        options = {"num_cpus": 1, "max_retries": MOST_TRIES - 1, "scheduling_strategy": "SPREAD"}
        task = ray.remote(**options)(_scored)
        yield lambda plans: _in_order(plans, lambda plan: task.remote(name, stored, plan), at_once)
    finally:
        if ours:
            ray.shutdown()


def _check_reachable(address: str) -> None:
    """Refuse a host and port where nobody listens; Ray itself would wait for minutes."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not (host and port.isdigit()):
        return
    try:
        socket.create_connection((host, int(port)), timeout=_PATIENCE).close()
    except OSError as fault:
        raise WorkerError(f"no Ray cluster at {address!r}: {fault}") from fault


def _in_order(plans: Sequence[Plan], submit: Any, at_once: int) -> Iterator[Scored]:
    import ray

    running: deque[Any] = deque()
    submitted = 0
    try:
        for plan in plans:
            while submitted < len(plans) and len(running) < at_once:
                running.append(submit(plans[submitted]))
                submitted += 1
            try:
                answer = ray.get(running.popleft())
            except ray.exceptions.RayTaskError as fault:
                raise getattr(fault, "cause", None) or fault from None
            except ray.exceptions.RayError as fault:
                raise brought_down(plan, type(fault).__name__) from fault
            yield Scored(*answer)
    finally:
        for left in running:
            ray.cancel(left, force=False)


_LOADED: dict[str, Any] = {}
"""In a worker: what scores plans, by the hash of its payload; the last one only."""


def _scored(name: str, stored: list[Any], plan: Plan) -> tuple[float, float]:
    """A plan's score and seconds, in a worker."""
    if name not in _LOADED:
        import ray

        _LOADED.clear()
        _LOADED[name] = loaded(ray.get(stored[0]))
    score, seconds = timed(_LOADED[name], plan)
    return score, seconds
