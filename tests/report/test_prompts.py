"""Pass rates by prompt, from the rollouts of live loops and the scores of rounds."""

import csv
import json
from pathlib import Path
from typing import Any

from halos.report.prompts import write_prompts
from halos.report.read import Record
from halos.rollout import batch_files


def row(name: str, reward: float | None, split: str = "train") -> dict[str, Any]:
    return {"prompt_id": name, "split": split, "prompt": [{"role": "user", "content": f"What is\n{name}?"}], "output": [],
            "reward": reward}  # fmt: skip


def record(path: Path, **online: Any) -> Record:
    return Record(path, path.name, "online dpo", {"online": {"scorer": {"name": "function"}, **online}}, "finished", 2, (), ())


def table(*records: Record, output: Path) -> list[list[str]]:
    path, problems = write_prompts(records, output)
    assert path is not None
    assert problems == []
    return list(csv.reader(path.open()))[1:]


def test_live_batches_and_rounds_give_a_row_for_each_prompt_the_hardest_first(tmp_path: Path) -> None:
    live, rounds = tmp_path / "live", tmp_path / "rounds_run"
    live.mkdir()
    batch_files.write(live, 0, [row("a", 1.0), row("a", 0.5), row("b", 0.0)])
    batch_files.write(live, 1, [row("a", 1.0), row("b", None), row("c", None)])
    scores = rounds / "rounds" / "000" / "scores.jsonl"
    scores.parent.mkdir(parents=True)
    scores.write_text("".join(json.dumps(each) + "\n" for each in [row("a", 4.0), row("a", 2.0), row("h", 4.0, "eval")]))
    found = table(record(live), record(rounds, pass_reward=4.0), output=tmp_path / "report")
    assert found == [
        ["live", "train", "b", "2", "1", "0.0", "0.0", "What is b?"],
        ["live", "train", "a", "3", "3", "0.833333", "0.666667", "What is a?"],
        ["live", "train", "c", "1", "0", "", "", "What is c?"],
        ["rounds_run", "train", "a", "2", "2", "3.0", "0.5", "What is a?"],
        ["rounds_run", "eval", "h", "1", "1", "4.0", "1.0", "What is h?"],
    ]


def test_where_the_full_reward_is_not_known_it_is_the_highest_and_runs_without_rollouts_have_no_table(tmp_path: Path) -> None:
    (tmp_path / "judged").mkdir()
    judged = record(tmp_path / "judged", scorer={"name": "judge"})
    assert write_prompts([judged], tmp_path / "report") == (None, [])
    batch_files.write(judged.path, 0, [row("a", 7.0), row("a", 3.0)])
    assert table(judged, output=tmp_path / "report")[0][5:7] == ["5.0", "0.5"]
    batch_files.files_of(judged.path)[0].write_bytes(b"damaged")
    path, [problem] = write_prompts([judged], tmp_path / "report")
    assert (path, "000000.jsonl.gz cannot be unpacked" in problem) == (None, True)
