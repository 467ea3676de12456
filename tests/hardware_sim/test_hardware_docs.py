from __future__ import annotations

import re
from pathlib import Path

import pytest

from autocompress.hardware_sim import UnsupportedLayerError
from autocompress.hardware_sim.target_file import MODELS

DOCS = Path(__file__).parents[2] / "docs"


def test_the_example_model_of_the_docs_is_lawful() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "hardware.md").read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, object] = {"__name__": "example"}
    for block in blocks:
        exec(compile(block, "docs/hardware.md", "exec", dont_inherit=True), names)
    machine, graph = names["machine"], names["graph"]
    with pytest.raises(UnsupportedLayerError, match="at most 8 bits"):
        machine(graph)  # type: ignore[operator]


def test_every_model_has_its_line_in_the_index() -> None:
    text = (DOCS / "hardware.md").read_text(encoding="utf-8")
    assert [name for name in MODELS if f"[{name}](hardware/{name}.md)" not in text] == []
