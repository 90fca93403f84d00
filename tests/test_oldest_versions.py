"""The oldest transformers that requirements.txt names runs what leans on its inner parts: packing, merging, the sampler."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OLDEST = Path(sys.prefix) / "oldest"  # launch/test.sh puts it there
RUNS = [
    "loss=dpo peft=lora exp_name=adapter checkpoint.every=1",
    "loss=reward exp_name=scores",
    "loss=online online.loss=grpo online.steps=2 online.samples_per_prompt=4 online.eval_prompts=4 "
    "online.sampler.max_new_tokens=8 exp_name=live",
]
SHARED = "model=tiny data=arithmetic train.steps=2 train.batch_size=8"
SCRIPT = """
import json, sys
import transformers
import train
for words in json.loads(sys.argv[1]):
    try:
        status = train.start(words)
    except SystemExit as end:
        status = end.code
    assert status == 0, (words, status)
print(transformers.__version__)
"""


@pytest.mark.slow
def test_the_oldest_transformers_trains_merges_and_samples(tmp_path: Path, cache: Path) -> None:
    named = next(line for line in (ROOT / "requirements.txt").read_text().splitlines() if "transformers 5." in line)
    version = named.partition("transformers ")[2].split()[0]
    if not (OLDEST / "transformers").is_dir():
        pytest.fail(f"{OLDEST} is not there: `bash launch/test.sh slow versions` installs transformers {version} into it")
    runs = [[*words.split(), *SHARED.split(), f"output_root={tmp_path}", f"cache_dir={cache}"] for words in RUNS]
    environment = {**os.environ, "PYTHONPATH": f"{OLDEST}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(runs)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split()[-1].startswith(f"{version}."), done.stdout
    for name in ("adapter", "scores", "live"):
        assert json.loads((tmp_path / name / "result.json").read_text())["status"] == "finished"
    assert json.loads((tmp_path / "adapter" / "FINAL" / "merge_report.json").read_text())["holds"] is True
