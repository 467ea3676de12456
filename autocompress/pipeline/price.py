"""What a network costs on one machine or several, as tables, CSV, JSON and a chart."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from markupsafe import Markup

from autocompress.core import Bits, LayerGraph, Metric, Plan
from autocompress.core.errors import RecipeError
from autocompress.hardware_sim.finn_dataflow import FinnDataflow
from autocompress.hardware_sim.macs import MacsModel
from autocompress.hardware_sim.model import HardwareModel, LayerCosts, UnsupportedLayerError
from autocompress.hardware_sim.table import Floats
from autocompress.hardware_sim.target_file import load_target
from autocompress.pipeline.plots import NUM_COLOURS, Axis, Row, Series, paired_bars, si, xy_chart
from autocompress.trace import trace
from autocompress.zoo import build

MAX_PLAN_BYTES = 10_000_000
_RESOURCES = ("luts", "brams", "dsps")

_COLOURS = ("#1f6fb2", "#d9822b", "#3a8a4d", "#a33b8c", "#b23b3b", "#555555", "#0f8a8a")
_STYLE = Markup("<style>{}</style>").format(
    "text{font:12px sans-serif;fill:#333}.grid{stroke:#ddd}.axis{stroke:#666}.before{fill:#bbb}"
    "polyline{fill:none;stroke-width:2}rect.c0{fill:#1f6fb2}"
    + "".join(f"polyline.c{i}{{stroke:{colour}}}" for i, colour in enumerate(_COLOURS))
)


@dataclass(frozen=True)
class Priced:
    """One network on one machine.

    Args:
        model: the machine, or what counts without one.
        graph: the network.
        costs: of each layer, per sample; counts are in ``extra`` and have no latency.
        totals: of the network.
    """

    model: HardwareModel | MacsModel
    graph: LayerGraph
    costs: LayerCosts
    totals: Mapping[Metric, float]

    @property
    def energy_pj(self) -> dict[str, float]:
        """Component -> picojoules of all layers for one sample; empty when the machine gives none."""
        return {name: float(part.sum()) for name, part in self.costs.energy_pj.items()}

    @property
    def resources(self) -> dict[str, float]:
        """LUTs, block RAMs and DSP slices of all layers, where each has hardware of its own."""
        if not isinstance(self.model, HardwareModel) or self.model.additive:
            return {}
        return {n: float(self.costs.extra[n].sum()) for n in _RESOURCES if n in self.costs.extra}

    @property
    def notes(self) -> list[str]:
        """What must be known to read the totals."""
        share = float(self.costs.extra.get("device_share", np.zeros(1)).max())
        if share <= 1:
            return []
        return [
            f"{self.model.name}: does not fit the device: needs {share:.3g} times what a design may take; "
            "its figures are for comparing plans, not a prediction"
        ]

    def layer(self, index: int) -> dict[str, Any]:
        """The figures of one layer by name, with their units."""
        spec, costs = self.graph.layers[index], self.costs
        row: dict[str, Any] = {
            "layer": spec.name,
            "macs": spec.macs,
            "weight_bits": spec.bits.weight,
            "act_bits": spec.bits.act,
        }
        if len(costs.latency_ms):
            row["latency_ms"] = float(costs.latency_ms[index])
        row |= {f"energy_pj_{name}": float(part[index]) for name, part in costs.energy_pj.items()}
        if len(costs.utilisation):
            row["utilisation"] = float(costs.utilisation[index])
        if len(costs.memory_bound):
            row["bound_by"] = "memory" if costs.memory_bound[index] else "compute"
        return row | {name: float(part[index]) for name, part in costs.extra.items()}


def traced_graph(model: str, *, input_shape: Sequence[int], num_classes: int) -> LayerGraph:
    """The layers of a network by name, with fresh weights.

    Args:
        model: as for :func:`autocompress.zoo.build`.
        input_shape: (C, H, W) of one image.
        num_classes: outputs of the network.

    Raises:
        AutocompressError: the name, the shape or the network is wrong.
    """
    with torch.random.fork_rng():
        network = build(model, num_classes=num_classes, in_channels=input_shape[0])
    return trace(network, input_shape).graph


def changed_graph(graph: LayerGraph, *, bits: str | None = None, plan: Path | None = None) -> LayerGraph:
    """The graph with the same bits in every layer, then with a plan applied.

    Args:
        graph: of the uncompressed network.
        bits: ``"8"`` for weights and activations, ``"4,8"`` for weights of 4 and activations of 8 bits.
        plan: JSON file of a plan, or of a run's result that holds one.

    Raises:
        RecipeError: bits or plan that are wrong or do not fit the network.
    """
    if bits is not None:
        chosen = _bits(bits)
        graph = graph.with_bits({layer.name: chosen for layer in graph.layers})
    if plan is None:
        return graph
    try:
        if plan.stat().st_size > MAX_PLAN_BYTES:
            raise ValueError(f"larger than {MAX_PLAN_BYTES:,} bytes")
        data = json.loads(plan.read_text(encoding="utf-8"))
        inner = data["plan"] if isinstance(data, dict) and "plan" in data else data
        return Plan.from_json(json.dumps(inner)).apply(graph)
    except (OSError, ValueError) as fault:
        raise RecipeError(f"plan {plan} cannot be applied: {fault}") from fault


def _bits(text: str) -> Bits:
    try:
        numbers = [int(part) for part in text.split(",")]
        weight, act = numbers * 2 if len(numbers) == 1 else numbers
        return Bits(weight, act)
    except ValueError as fault:
        raise RecipeError(
            f"bits must be one number or two, weights first, from 1 to 32, as 8 or 4,8; got {text!r}"
        ) from fault


def parse_shape(text: str) -> tuple[int, int, int]:
    """``"3,224,224"`` as (C, H, W).

    Raises:
        RecipeError: not three whole numbers > 0.
    """
    parts = [int(part) if part.strip().isdecimal() else 0 for part in text.split(",")]
    if len(parts) != 3 or min(parts) < 1:
        raise RecipeError(f"input must be three whole numbers > 0, channels,height,width; got {text!r}")
    return parts[0], parts[1], parts[2]


def price(graph: LayerGraph, targets: Sequence[str], *, batch: int = 1) -> list[Priced]:
    """The network on every machine, in the order given.

    Args:
        graph: with the bits the machines should run.
        targets: names of bundled targets, target files, or ``macs`` for counts.
        batch: samples priced together; figures are per sample.

    Raises:
        RecipeError: no target.
        TargetError: a target that does not exist or is wrong.
        UnsupportedLayerError: machines that cannot run a layer; those of all targets at once.
    """
    if not targets:
        raise RecipeError("name a target; `autocompress list targets` lists those that come with the package")
    priced, faults = [], []
    models = [MacsModel() if t == MacsModel.name else load_target(t, batch=batch) for t in targets]
    for model in models:
        try:
            priced.append(_counted(model, graph) if isinstance(model, MacsModel) else _priced(model, graph))
        except UnsupportedLayerError as fault:
            faults.append(f"{model.name}: {fault}")
    if faults:
        raise UnsupportedLayerError("\n".join(faults))
    return priced


def _priced(model: HardwareModel, graph: LayerGraph) -> Priced:
    costs = model.graph_costs(graph)
    totals = model.totals(costs, len(graph.layers))
    return Priced(model, graph, costs, {metric: float(v[0]) for metric, v in totals.items()})


def _counted(model: MacsModel, graph: LayerGraph) -> Priced:
    cost = model(graph)
    counts: dict[str, Floats] = {
        metric: np.array([cost.layers[layer.name][metric] for layer in graph.layers])
        for metric in model.metrics
        if metric != "macs"  # every table has them
    }
    return Priced(model, graph, LayerCosts(np.zeros(0), extra=counts), cost.totals)


def rows(priced: Sequence[Priced]) -> list[dict[str, Any]]:
    """One row per machine and layer, and one of each machine's totals, named ``total``."""
    table = []
    for one in priced:
        target = {"target": one.model.name}
        table += [target | one.layer(index) for index in range(len(one.graph.layers))]
        energy = {f"energy_pj_{name}": value for name, value in one.energy_pj.items()}
        macs = sum(layer.macs for layer in one.graph.layers)
        table.append(target | {"layer": "total", "macs": macs} | energy | dict(one.totals))
    return table


def as_csv(priced: Sequence[Priced]) -> str:
    """:func:`rows` as CSV with the columns of all machines; empty where a machine does not give a figure."""
    table = rows(priced)
    text = io.StringIO()
    writer = csv.DictWriter(
        text, list(dict.fromkeys(key for row in table for key in row)), lineterminator="\n"
    )
    writer.writeheader()
    writer.writerows(table)
    return text.getvalue()


def as_json(priced: Sequence[Priced]) -> str:
    """Everything known, one object per machine."""
    data = [
        {
            "target": one.model.name,
            "model": one.model.kind,
            "mapping": one.model.mapping,
            "energy_table": one.model.energy_table,
            "batch": one.model.batch,
            "totals": dict(one.totals),
            "energy_pj": one.energy_pj,
            "layers": [one.layer(index) for index in range(len(one.graph.layers))],
            "not_counted": list(one.graph.uncounted),
        }
        for one in priced
    ]
    return json.dumps(data, indent=2)


def table_of(one: Priced) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of texts for one machine; the last row is the total."""
    energy, costs = one.costs.energy_pj, one.costs
    timed = bool(len(costs.latency_ms))
    counts = costs.extra if isinstance(one.model, MacsModel) else {}
    headings = ["layer", "W/A bits", "MACs", *["latency ms"] * timed, *(f"{name} uJ" for name in energy)]
    headings += [name.replace("_", " ") for name in counts]
    headings += ["utilisation"] * bool(len(costs.utilisation)) + ["bound by"] * bool(len(costs.memory_bound))
    body = []
    for index, spec in enumerate(one.graph.layers):
        figures = one.layer(index)
        row = [spec.name, f"{spec.bits.weight}/{spec.bits.act}", si(spec.macs)]
        row += [f"{figures['latency_ms']:.4g}"] if timed else []
        row += [f"{part[index] * 1e-6:.4g}" for part in energy.values()]
        row += [si(figures[name]) for name in counts]
        row += [f"{figures['utilisation']:.0%}"] if "utilisation" in figures else []
        body.append([*row, figures["bound_by"]] if "bound_by" in figures else row)
    macs = si(sum(layer.macs for layer in one.graph.layers))
    total = ["total", "", macs, *([f"{one.totals['latency_ms']:.4g}"] if timed else [])]
    total += [f"{value * 1e-6:.4g}" for value in one.energy_pj.values()]
    total += [si(value) for metric, value in one.totals.items() if metric in counts]
    body.append(total + [""] * (len(headings) - len(total)))
    return headings, body


def totals_of(priced: Sequence[Priced]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of texts that set the machines' totals side by side, one row per metric."""
    metrics = list(dict.fromkeys(metric for one in priced for metric in one.totals))
    body = [
        [metric, *(f"{one.totals[metric]:,.4g}" if metric in one.totals else "-" for one in priced)]
        for metric in metrics
    ]
    components = list(dict.fromkeys(name for one in priced for name in one.energy_pj))
    body += [
        [
            f"energy, {name} (uJ)",
            *(f"{one.energy_pj[name] * 1e-6:,.4g}" if name in one.energy_pj else "-" for one in priced),
        ]
        for name in components
    ]
    if any(isinstance(one.model, FinnDataflow) for one in priced):
        alone = [
            one.model.single_image_ms(one.graph) if isinstance(one.model, FinnDataflow) else None
            for one in priced
        ]
        shown = [f"{value:,.4g}" if value is not None else "-" for value in alone]
        body.append(["one image alone (ms)", *shown])
    body += [
        [
            f"{name} of all layers",
            *(f"{one.resources[name]:,.0f}" if name in one.resources else "-" for one in priced),
        ]
        for name in _RESOURCES
        if name not in metrics and any(name in one.resources for one in priced)
    ]
    for label, values in (
        ("mapping", [one.model.mapping for one in priced]),
        ("energy table", [one.model.energy_table for one in priced]),
    ):
        body.append([label, *values])
    return ["", *(one.model.name for one in priced)], body


def write_chart(priced: Sequence[Priced], path: Path) -> None:
    """Write :func:`chart` to a file.

    Raises:
        RecipeError: no machine has latencies, or the file cannot be written.
    """
    timed = [one for one in priced if len(one.costs.latency_ms)]
    if not timed:
        raise RecipeError("counts have no latency to plot; name a machine with --target or --compare")
    try:
        path.write_text(chart(timed), encoding="utf-8")
    except OSError as fault:
        raise RecipeError(f"cannot write {path}: {fault}") from fault


def chart(priced: Sequence[Priced]) -> str:
    """Latency per layer as SVG: of one machine with the part spent at full rate, of several as lines."""
    drawing = _bars(priced[0]) if len(priced) == 1 else _lines(priced)
    legend = Markup('<text x="{}" y="12" style="fill:{}">{}</text>')
    names = [
        legend.format(80 + 210 * i, _COLOURS[i % NUM_COLOURS], one.model.name) for i, one in enumerate(priced)
    ]
    head, _, rest = drawing.partition(">")
    return f"{head}>{_STYLE}{''.join(names) if len(priced) > 1 else ''}{rest}\n"


def _bars(one: Priced) -> Markup:
    share = one.costs.utilisation if len(one.costs.utilisation) else np.ones(len(one.costs.latency_ms))
    bars = [
        Row(
            spec.name,
            float(ms),
            float(ms * busy),
            f"{ms:.3g} ms",
            f"{spec.name}: {ms:.4g} ms, {busy:.0%} busy",
        )
        for spec, ms, busy in zip(one.graph.layers, one.costs.latency_ms, share, strict=True)
    ]
    return paired_bars(
        bars, label=f"latency on {one.model.name} in ms; blue: of it at the full multiply rate"
    )


def _lines(priced: Sequence[Priced]) -> Markup:
    longest = [float(one.costs.latency_ms.max()) for one in priced]
    series = [
        Series(one.model.name, tuple(enumerate(map(float, one.costs.latency_ms))), i % NUM_COLOURS, "line")
        for i, one in enumerate(priced)
    ]
    x = Axis.over("layer", [0, len(priced[0].graph.layers)], whole=True)
    return xy_chart(series, x=x, y=Axis.over("latency in ms", [0.0, *longest]))
