from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
from commands import command

from autocompress.core import Bits, LayerGraph, Plan
from autocompress.core.errors import AutocompressError, RecipeError
from autocompress.hardware_sim import MacsModel, UnsupportedLayerError
from autocompress.hardware_sim.target_file import bundled_targets, load_target
from autocompress.pipeline.price import (
    as_csv,
    as_json,
    changed_graph,
    chart,
    parse_shape,
    price,
    table_of,
    totals_of,
    traced_graph,
)


@pytest.fixture(scope="module")
def graph() -> LayerGraph:
    return traced_graph("digits_vgg", input_shape=(1, 8, 8), num_classes=10)


def test_totals_are_those_of_the_machine_and_layers_add_up_to_them(graph: LayerGraph) -> None:
    eight = changed_graph(graph, bits="8")
    for one, name in zip(
        price(eight, ["xeon-amx", "systolic-16x16"]), ("xeon-amx", "systolic-16x16"), strict=True
    ):
        assert one.totals == load_target(name)(eight).totals
        layers = [one.layer(i) for i in range(len(graph.layers))]
        assert sum(layer["latency_ms"] for layer in layers) == pytest.approx(one.totals["latency_ms"])
        energy = sum(v for layer in layers for key, v in layer.items() if key.startswith("energy_pj_"))
        assert energy * 1e-9 == pytest.approx(one.totals.get("energy_mj", 0.0))


def test_bits_are_those_of_every_layer_and_a_plan_overrides_them(graph: LayerGraph, tmp_path: Path) -> None:
    assert {layer.bits for layer in changed_graph(graph, bits="4,8").layers} == {Bits(4, 8)}
    assert {layer.bits for layer in changed_graph(graph, bits="6").layers} == {Bits(6, 6)}
    assert changed_graph(graph) == graph
    first, group = graph.layers[0], graph.prunable[0]
    plan = Plan(channels={group.name: 5}, bits={first.name: Bits(2, 3)})
    for text in (plan.to_json(), json.dumps({"plan": json.loads(plan.to_json()), "name": "a run's result"})):
        (tmp_path / "plan.json").write_text(text)
        changed = changed_graph(graph, bits="8", plan=tmp_path / "plan.json")
        assert changed.layers[0].bits == Bits(2, 3)
        assert changed.layers[1].bits == Bits(8, 8)
        assert changed.sizes == plan.apply(graph).sizes


def test_layers_that_machines_cannot_run_are_named_for_all_targets_at_once(graph: LayerGraph) -> None:
    with pytest.raises(UnsupportedLayerError) as caught:
        price(graph, ["bitfusion", "xeon-amx", "finn-zcu102"])
    for target in ("bitfusion", "finn-zcu102"):
        assert f"{target}: layers {graph.layers[0].name}, {graph.layers[1].name}" in str(caught.value)


@pytest.mark.parametrize("bits", ["", "0", "33", "4,8,8", "a", "4;8"])
def test_bits_that_cannot_be_are_refused(graph: LayerGraph, bits: str) -> None:
    with pytest.raises(RecipeError, match="bits must be one number or two"):
        changed_graph(graph, bits=bits)


@pytest.mark.parametrize("shape", ["3,224", "3,224,0", "a,b,c", "3,-1,4", "1,2,3,4"])
def test_shapes_that_cannot_be_are_refused(shape: str) -> None:
    with pytest.raises(RecipeError, match="input must be three whole numbers"):
        parse_shape(shape)


def test_plans_that_do_not_fit_are_refused(graph: LayerGraph, tmp_path: Path) -> None:
    wrong = tmp_path / "plan.json"
    for text in ("{", "[]", '{"channels": {"nowhere": 3}}', '{"widths": {}}'):
        wrong.write_text(text)
        with pytest.raises(RecipeError, match="cannot be applied"):
            changed_graph(graph, plan=wrong)
    with pytest.raises(RecipeError, match="cannot be applied"):
        changed_graph(graph, plan=tmp_path / "missing.json")


def test_csv_and_json_hold_every_layer_of_every_machine(graph: LayerGraph) -> None:
    priced = price(changed_graph(graph, bits="8"), ["xeon-amx", "bitfusion"], batch=4)
    rows = list(csv.DictReader(io.StringIO(as_csv(priced))))
    names = [layer.name for layer in graph.layers]
    assert [(row["target"], row["layer"]) for row in rows] == [
        (target, layer) for target in ("xeon-amx", "bitfusion") for layer in [*names, "total"]
    ]
    data = json.loads(as_json(priced))
    for one, entry in zip(priced, data, strict=True):
        assert entry["totals"] == dict(one.totals)
        assert [layer["layer"] for layer in entry["layers"]] == names
        assert entry["batch"] == 4
        assert entry["mapping"]
        assert entry["energy_table"]
        total = next(row for row in rows if row["target"] == one.model.name and row["layer"] == "total")
        assert float(total["latency_ms"]) == one.totals["latency_ms"]


def test_tables_have_a_text_for_every_heading(graph: LayerGraph) -> None:
    priced = price(changed_graph(graph, bits="8"), ["xeon-amx", "bitfusion", "systolic-16x16"])
    for headings, body in [*(table_of(one) for one in priced), totals_of(priced)]:
        assert {len(row) for row in body} == {len(headings)}
    headings, body = totals_of(priced)
    assert headings[1:] == ["xeon-amx", "bitfusion", "systolic-16x16"]
    energy = next(row for row in body if row[0] == "energy_mj")
    assert energy[1] == "-"
    assert energy[2] == f"{priced[1].totals['energy_mj']:,.4g}"


def test_counts_are_a_target_and_those_of_each_layer_add_up(graph: LayerGraph) -> None:
    counted, machine = price(changed_graph(graph, bits="8"), ["macs", "xeon-amx"])
    assert counted.totals == MacsModel()(counted.graph).totals
    layers = [counted.layer(i) for i in range(len(graph.layers))]
    for metric in ("macs", "bitops"):
        assert sum(layer[metric] for layer in layers) == counted.totals[metric]
    assert max(layer["peak_memory_bytes"] for layer in layers) == counted.totals["peak_memory_bytes"]
    headings, body = table_of(counted)
    assert headings == ["layer", "W/A bits", "MACs", "params", "bitops", "weight bytes", "peak memory bytes"]
    assert {len(row) for row in body} == {len(headings)}
    assert json.loads(as_json([counted]))[0]["totals"] == counted.totals
    _, totals = totals_of([counted, machine])
    assert next(row for row in totals if row[0] == "params")[1:] == [f"{counted.totals['params']:,.4g}", "-"]


def test_resources_and_the_time_of_one_image_are_shown_and_a_full_device_is_told(graph: LayerGraph) -> None:
    fits, machine = price(changed_graph(graph, bits="2"), ["finn-zynq7020", "xeon-amx"])
    body = {row[0]: row[1:] for row in totals_of([fits, machine])[1]}
    assert body["luts of all layers"] == [f"{fits.costs.extra['luts'].sum():,.0f}", "-"]
    alone = load_target("finn-zynq7020").single_image_ms(fits.graph)  # type: ignore[attr-defined]
    assert body["one image alone (ms)"] == [f"{alone:,.4g}", "-"]
    assert fits.notes == []
    assert machine.notes == []
    (large,) = price(
        changed_graph(traced_graph("resnet56", input_shape=(3, 32, 32), num_classes=10), bits="8"),
        ["finn-zynq7020"],
    )
    share = large.costs.extra["device_share"][0]
    assert share > 1
    (note,) = large.notes
    assert f"does not fit the device: needs {share:.3g} times" in note


def test_charts_are_svg_with_a_mark_per_layer_or_machine(graph: LayerGraph) -> None:
    priced = price(changed_graph(graph, bits="8"), ["xeon-amx", "bitfusion"])
    alone = ElementTree.fromstring(chart(priced[:1]))
    assert len(alone.findall("{*}g")) == len(graph.layers)
    together = ElementTree.fromstring(chart(priced))
    assert len(together.findall("{*}polyline")) == 2
    texts = [text.text for text in together.findall("{*}text")]
    assert {"xeon-amx", "bitfusion"} <= set(texts)


def test_the_command_writes_tables_csv_json_and_a_plot(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = (
        "price",
        "digits_vgg",
        "--input",
        "1,8,8",
        "--classes",
        "10",
        "--bits",
        "8",
        "--target",
        "xeon-amx",
    )
    code, text, _ = command(capsys, *words, "--compare", "bitfusion", "--plot", "p.svg")
    assert code == 0
    assert "xeon-amx" in text
    assert "bitfusion" in text
    assert Path("p.svg").read_text().startswith("<svg")
    code, text, _ = command(capsys, *words, "--format", "json")
    assert (code, json.loads(text)[0]["target"]) == (0, "xeon-amx")
    code, text, _ = command(capsys, *words, "--format", "csv")
    assert (code, text.splitlines()[0].split(",")[:2]) == (0, ["target", "layer"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "name a target"),
        (("--target", "xeon-am"), "did you mean 'xeon-amx'?"),
        (("--target", "xeon-amx", "--batch", "0"), "batch must be >= 1"),
        (("--target", "bitfusion"), "give the layer bits"),
        (("--target", "xeon-amx", "--bits", "99"), "bits must be"),
        (("--target", "xeon-amx", "--plan", "none.json"), "cannot be applied"),
        (("--target", "xeon-amx", "--plot", "missing/p.svg"), "cannot write"),
        (("--target", "macs", "--plot", "p.svg"), "counts have no latency to plot"),
    ],
)
def test_wrong_arguments_end_with_code_2_and_one_message(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, said = command(capsys, "price", "digits_vgg", "--input", "1,8,8", "--classes", "10", *words)
    assert code == 2
    assert said.count("error:") == 1
    assert message in said


def test_list_targets_names_every_bundled_target(capsys: pytest.CaptureFixture[str]) -> None:
    code, text, _ = command(capsys, "list", "targets")
    assert code == 0
    listed = [line.split(":")[0] for line in text.splitlines()]
    assert listed == ["macs", *(path.stem for path in bundled_targets())]


def test_profile_fits_measurements_of_a_device_elsewhere(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    golden = Path(__file__).parents[1] / "golden" / "this_cpu_fit.csv"
    code, text, _ = command(capsys, "profile", "--target", "elsewhere", "--csv", str(golden))
    assert code == 0
    assert "32 bits: median error" in text
    assert load_target("elsewhere.yaml").name == "elsewhere"
    code, _, said = command(capsys, "profile", "--csv", "missing.csv")
    assert (code, "cannot be read as CSV" in said) == (2, True)


def test_networks_that_do_not_exist_are_told() -> None:
    with pytest.raises(AutocompressError, match="unknown model"):
        traced_graph("resnet21", input_shape=(3, 8, 8), num_classes=10)
