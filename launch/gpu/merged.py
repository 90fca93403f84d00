"""FINAL of a LoRA run, loaded by plain from_pretrained, is the base with its adapter by PEFT."""

import json
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from gpu import rows
from gpu.place import Place, Result

STEPS = 3
LARGEST = 1e-4  # nats between two float32 forwards of one model whose log-probs are of the order of ten nats
SHARE = 0.01  # of what the adapter changes: otherwise the comparison would show nothing


def check(name: str, place: Place) -> Result:
    made = rows.make("dpo-lora", "small", place, steps=STEPS, batch_size=8)
    base = place.model("small")
    done = place.train(
        "merged", "loss=dpo", "peft=lora", f"model.name_or_path={base}", f"data.train=['{made.path}']", "data.eval=[]",
        f"train.steps={STEPS}", "train.batch_size=8", f"train.max_length={rows.LONGEST}", "checkpoint.merge_dtype=float32",
        "optim.lr=1e-2", "schedule=constant",
    )  # fmt: skip
    if done.returncode:
        return Result.crash(done)
    final = place.run("merged") / "FINAL"
    report = json.loads((final / "merge_report.json").read_text())
    ids = torch.randint(6, AutoTokenizer.from_pretrained(base).vocab_size, (2, 48), generator=torch.Generator().manual_seed(0))
    merged = _loaded(final, place)
    alone = _loaded(base, place)
    values = [_logps(model, ids) for model in (merged, alone)]
    adapted = _logps(PeftModel.from_pretrained(alone, str(final / "adapter")), ids)  # it changes `alone`
    off, changed = ((values[0] - other).abs().max().item() for other in (adapted, values[1]))
    new = merged.to(torch.bfloat16).generate(input_ids=ids[:1].to(place.device), max_new_tokens=8, do_sample=False)
    good = bool(report["holds"]) and off <= min(LARGEST, SHARE * changed) and new.shape[1] > ids.shape[1]
    proof = "holds" if report["holds"] else "fails"
    figure = f"the proof {proof}; {off:.1e} nats off base and adapter, {changed:.2g} off the base"
    return Result.of(good, figure, report=report["logits"], off=off, changed=changed)


def _loaded(directory: Any, place: Place) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).to(place.device).eval()


@torch.no_grad()
def _logps(model: Any, ids: Tensor) -> Tensor:
    here = ids.to(model.device)
    return model(input_ids=here).logits[:, :-1].double().log_softmax(-1).gather(-1, here[:, 1:, None])
