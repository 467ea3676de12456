from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("qonnx", reason="the extra fpga is not installed")
pytest.importorskip("hls4ml", reason="the extra fpga is not installed")

GUIDE = Path(__file__).parents[2] / "docs" / "how-to" / "hand-off-to-fpga.md"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="hls4ml's emulation needs g++")
def test_the_examples_of_the_guide_run_and_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 2
    names: dict[str, object] = {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for block in blocks:
            exec(compile(block, GUIDE.name, "exec", dont_inherit=True), names)
