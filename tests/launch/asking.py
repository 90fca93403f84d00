"""A hook that samples from the policy at each evaluation, and saves what each rank got."""

import json
from typing import Any

from halos.hooks.base import Hook, Run


class Asking(Hook):
    def on_eval(self, run: Run, metrics: Any) -> dict[str, float]:
        prompts = [f"What is {number} + 1?" for number in range(5)]
        texts = run.generate(prompts, max_new_tokens=6) + run.generate(prompts, max_new_tokens=6, temperature=1.0)
        name = f"said-{run.step}-{run.accelerator.process_index}.json"
        (run.directory.path / name).write_text(json.dumps(texts))
        return {"letters": sum(map(len, texts))}
