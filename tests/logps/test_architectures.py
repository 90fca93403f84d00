"""The table of architectures: what it says of each is what comes out, and what the README says of them is the table's."""

import dataclasses
import importlib.util
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "launch" / "results" / "architectures.py"
VERDICTS = ("packed", "alone", "refused", "not built")


def verdicts(table: Path) -> dict[str, str]:
    rows = [line.strip("| ").split(" | ") for line in table.read_text().splitlines() if line.startswith("| ")]
    return {row[0]: row[2] for row in rows[2:]}


def test_the_table_is_of_every_architecture_and_none_is_wrong() -> None:
    table = verdicts(SCRIPT.with_suffix(".md"))
    assert table.keys() == set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert set(table.values()) == set(VERDICTS)


def test_the_manual_counts_what_the_table_holds() -> None:
    counts = Counter(verdicts(SCRIPT.with_suffix(".md")).values())
    row = re.compile(r"^\| (packed|one at a time|refused|could not be built)[^|]*\| (\d+) \|", re.M)
    lines = row.findall((ROOT / "config" / "README.md").read_text())
    assert [int(number) for _, number in lines] == [counts[verdict] for verdict in VERDICTS]


@pytest.mark.slow
def test_the_table_says_what_comes_out(tmp_path: Path) -> None:
    again = tmp_path / "again.md"
    done = subprocess.run([sys.executable, str(SCRIPT), "--output", str(again)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert verdicts(again) == verdicts(SCRIPT.with_suffix(".md"))


def test_a_forward_that_is_not_the_models_own_is_wrong_in_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.spec_from_file_location("architectures", SCRIPT)
    assert found is not None
    assert found.loader is not None
    script: Any = importlib.util.module_from_spec(found)
    monkeypatch.setitem(sys.modules, "architectures", script)  # its dataclass asks for it
    found.loader.exec_module(script)
    assert script.evaluate("llama", tmp_path / "right").verdict == "packed"
    plain = script.LanguageModel.forward

    def scaled(self: Any, batch: Any) -> Any:
        logps = plain(self, batch)
        return dataclasses.replace(logps, values=logps.values * 1.001)

    monkeypatch.setattr(script.LanguageModel, "forward", scaled)
    assert script.evaluate("llama", tmp_path / "wrong").verdict == "WRONG"
