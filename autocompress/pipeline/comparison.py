"""The figures of a result side by side as texts, for the report and the command line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

from autocompress.core import Budget, Cost, Metric, Result
from autocompress.hardware_sim import MacsModel
from autocompress.hardware_sim.target_file import MEASURED
from autocompress.pipeline.plots import percent

Row = tuple[str, str, str, str]

_MEASURED = {
    "macs": "MACs per image",
    "params": "Parameters",
    "file_bytes": "ONNX file (bytes)",
    "latency_ms": "Latency (ONNX Runtime, ms)",
}
_FORMS = {"float32": "as float32", "int8": "as int8"}
_ACCURACIES = {
    "accuracy": "Test accuracy",
    "accuracy_before_finetune": "Test accuracy pruned, before fine-tuning",
    "accuracy_before_quantise": "Test accuracy before quantisation",
    "accuracy_before_qat": "Test accuracy quantised, before training with rounding",
}
_UNITS = {
    "bitops": "Bit operations",
    "weight_bytes": "Weights, packed (bytes)",
    "peak_memory_bytes": "Peak activation memory (bytes)",
    "latency_ms": "Latency (ms)",
    "energy_mj": "Energy (mJ)",
    "luts": "LUTs",
    "brams": "Block RAMs",
    "dsps": "DSP slices",
}
_EXPECTED = {"accuracy_before": "before", "accuracy_after": "after"}


def number(value: float) -> str:
    """A figure in full where it is a count, else with four significant digits."""
    return f"{value:,.0f}" if float(value).is_integer() or abs(value) >= 1000 else f"{value:.4g}"


def points(difference: float) -> str:
    """A difference of two shares in percentage points."""
    return f"{100 * difference:+.2f} points"


def target_name(result: Result) -> str | None:
    """The machine that the predicted figures are for."""
    target = result.provenance.get("target")
    return str(target["name"]) if target else None


def comparison(result: Result) -> list[Row]:
    """Rows (figure, before, after, change): what was measured, then what was predicted, then expected."""
    return [*_measured(result), *_predicted(result), *_expected(result)]


def _measured(result: Result) -> Iterator[Row]:
    before, after = result.before, result.after
    for key, name in _ACCURACIES.items():
        if key in after and "accuracy" in before:
            change = points(after[key] - before["accuracy"])
            yield name, percent(before["accuracy"], 4), percent(after[key], 4), change
    for key, name in _MEASURED.items():
        if before.get(key) and key in after:
            yield name, number(before[key]), number(after[key]), _change(key, before[key], after[key])
        for form, said in _FORMS.items():
            old, new = before.get(f"{key}_{form}"), after.get(f"{key}_{form}")
            if old and new and (old, new) != (before[key], after[key]):
                yield f"{name} {said}", number(old), number(new), _change(key, old, new)


def _predicted(result: Result) -> Iterator[Row]:
    """The target's figures that changed, and whatever a budget is on."""
    before, after = (result.predicted.get(when, {}) for when in ("before", "after"))
    for key, unit in _UNITS.items():
        counted = key in MacsModel.metrics
        dull = counted or after.get(key) == before.get(key)
        if key not in after or (dull and key not in result.budgets):
            continue
        name = unit if counted else f"{unit}, predicted for {target_name(result)}"
        if before.get(key):
            yield name, number(before[key]), number(after[key]), _change(key, before[key], after[key])
        else:
            yield name, "-", number(after[key]), ""


def _change(key: str, before: float, after: float) -> str:
    change = f"{100 * (after / before - 1):+.1f} %"
    return f"{change} ({before / after:.2f} times the speed)" if key == "latency_ms" and after else change


def _expected(result: Result) -> Iterator[Row]:
    before, after = (percent(v, 4) if (v := result.expected.get(key)) else "-" for key in _EXPECTED)
    if (before, after) != ("-", "-"):
        verdict = "not reached" if shortfalls(result) else "reached"
        tolerance = 100 * result.expected["tolerance"]
        yield f"Test accuracy the recipe expects (to {tolerance:g} points)", before, after, verdict


def shortfalls(result: Result) -> list[str]:
    """What fell short of the accuracies the recipe expects, in words; empty when nothing did."""
    tolerance = result.expected.get("tolerance", 0.0)
    reached = {"accuracy_before": result.before, "accuracy_after": result.after}
    return [
        f"test accuracy {when} compression is {percent(reached[key]['accuracy'], 4)}; the recipe expects "
        f"{percent(result.expected[key], 4)}, or up to {100 * tolerance:g} points less"
        for key, when in _EXPECTED.items()
        if key in result.expected and reached[key]["accuracy"] < result.expected[key] - tolerance
    ]


def recovered(result: Result) -> str | None:
    """What quantisation cost and what training with rounding gave back; None without such training."""
    after = result.after
    start = after.get("accuracy_before_quantise", result.before.get("accuracy"))
    rounded = after.get("accuracy_before_qat")
    if start is None or rounded is None:
        return None
    return (
        f"Rounding changed the test accuracy by {points(rounded - start)}; training with rounding then "
        f"by {points(after['accuracy'] - rounded)}"
    )


_STAGE_NAMES = {
    "given": "as given",
    "train": "trained",
    "prune": "pruned",
    "finetune": "fine-tuned",
    "quantise": "quantised",
    "qat": "trained with rounding",
}


def chain_rows(result: Result) -> list[list[str]]:
    """Rows (network, test accuracy, cost by each budget's metric) of all stages, and of stages alone.

    Costs are followed by their share of the budget. Only of runs in which more than one stage compressed, or
    stages were run alone.
    """
    if not result.alone and len({tuple(_spent(result, step).values()) for step in result.chain}) < 3:
        return []
    rows = []
    original = result.predicted.get("original", {})
    if original and original != result.predicted.get("before"):
        rows.append(["largest of the space, not trained", "", *_spent(result, original).values()])
    rows += [
        [_STAGE_NAMES[step["stage"]], percent(step["accuracy"], 4), *_spent(result, step).values()]
        for step in result.chain
    ]
    for stage, found in result.alone.items():
        if "refused" in found:
            rows.append([f"{stage} alone", "cannot reach it", *("" for _ in result.budgets)])
        else:
            rows.append([f"{stage} alone", percent(found["accuracy"], 4), *_spent(result, found).values()])
    return rows


def _spent(result: Result, costs: Mapping[str, Any]) -> dict[str, str]:
    return {
        metric: f"{number(costs[metric])} ({percent(costs[metric] / limit)})" if metric in costs else ""
        for metric, limit in result.budgets.items()
    }


def prediction_check(result: Result) -> str | None:
    """How far the prediction of this very machine is from what was measured on it; None for others."""
    predicted = result.predicted.get("after", {}).get("latency_ms")
    measured = result.after.get("latency_ms")
    if target_name(result) != MEASURED or not predicted or not measured:
        return None
    return (
        f"{MEASURED} predicts {predicted:.3g} ms for the compressed network; ONNX Runtime took "
        f"{measured:.3g} ms (prediction {100 * (predicted / measured - 1):+.0f} %)"
    )


def budget_rows(result: Result) -> Iterator[tuple[str, str, str, bool | None]]:
    """Rows (metric, limit, reached, met or None where nothing says)."""
    # A budget binds what the cost models predict; MACs and parameters are counted on the network itself.
    known = dict(result.predicted.get("after", {}))
    known |= {metric: result.after[metric] for metric in ("macs", "params") if metric in result.after}
    costs = Cost({cast(Metric, metric): value for metric, value in known.items()})
    for name, limit in result.budgets.items():
        metric = cast(Metric, name)
        if metric not in costs.totals:
            yield metric, number(limit), "not recorded", None
            continue
        reached = f"{number(costs[metric])} ({percent(costs[metric] / limit)})"
        yield metric, number(limit), reached, Budget(metric, limit, relative=False).met_by(costs)
