#!/usr/bin/env python3
"""Stands for srun and scontrol on one machine: tasks become processes here, a requeue is written down."""

import os
import subprocess
import sys
from pathlib import Path

name, words = Path(sys.argv[0]).name, sys.argv[1:]
if name == "scontrol" and words[:2] == ["show", "hostnames"]:
    print("localhost")
elif name == "scontrol" and words[:2] == ["show", "job"]:
    print(f"JobId={words[2]} JobName=halos\n   JobState={os.environ.get('STUB_STATE', 'RUNNING')} Reason=None Requeue=1")
elif name == "scontrol" and words[0] == "requeue":
    Path(os.environ["STUB_REQUEUED"]).write_text(words[1])
elif name == "srun":
    options = [words.pop(0) for _ in iter(lambda: words[0].startswith("--"), False)]
    Path(os.environ["STUB_OPTIONS"]).write_text(" ".join(options))
    if "STUB_STATUS" in os.environ:
        sys.exit(int(os.environ["STUB_STATUS"]))
    count = int(os.environ["SLURM_NTASKS"])
    places = [{"SLURM_PROCID": str(n), "SLURM_LOCALID": str(n)} for n in range(count)]
    tasks = [subprocess.Popen(words, env={**os.environ, **place}) for place in places]
    Path(os.environ["STUB_TASKS"]).write_text(" ".join(str(task.pid) for task in tasks))
    sys.exit(max(status if status >= 0 else 128 - status for status in (task.wait() for task in tasks)))
else:
    sys.exit(f"{name} {words}: not stubbed")
