"""The model card, README.md: base, data and settings of a model, its evaluation metrics, and how to load it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from halos.checkpoint.lineage import on_the_hub
from halos.logps.vocabulary import Vocabulary
from halos.reward_kind import RewardKind

NAME = "README.md"
TRAIN = ("steps", "epochs", "batch_size", "max_length", "precision")
SETTINGS: dict[str, tuple[str, ...] | None] = {
    "loss": None, "train": TRAIN, "schedule": None, "optim": ("name", "lr", "loraplus_lr_ratio", "weight_decay"), "peft": None,
}  # fmt: skip


SCORE = [  # a template may write more after the end token of an answer, such as a line end, at which nothing was trained
    "",
    'turns = [{"role": "user", "content": "What is 2 + 3?"}, {"role": "assistant", "content": "5"}]',
    "text = tokenizer.apply_chat_template(turns, tokenize=False).rstrip()  # up to the end token: the score is read there",
    'text += "" if text.endswith(tuple(map(str, tokenizer.added_tokens_decoder.values()))) else tokenizer.eos_token',
    'score = model.eval()(**tokenizer(text, add_special_tokens=False, return_tensors="pt")).logits[0, 0].item()',
]


def write(directory: Path, lineage: Mapping[str, Any] | None, *, adapter: bool, reward: RewardKind | None, title: str) -> None:
    """Write README.md next to the weights in `directory`, those of an `adapter` or of a whole model."""
    runs = lineage["runs"] if lineage else []
    parts = [_front_matter(runs, adapter=adapter, reward=reward), f"# {title}", _summary(runs, adapter=adapter)]
    if runs:
        parts += [_metrics(runs[-1]), _settings(runs[-1]["config"]), _changed(runs[-1]), _lineage(runs)]
    vocabulary = Vocabulary.load(directory) or Vocabulary.load(directory / "adapter") if adapter else None
    parts.append(_how_to_load(runs, adapter=adapter, reward=reward, vocabulary=vocabulary))
    (directory / NAME).write_text("\n\n".join(part for part in parts if part) + "\n")


def _front_matter(runs: list[Any], *, adapter: bool, reward: RewardKind | None) -> str:
    """Return the YAML that the hub reads. Base and datasets are listed only if they are repositories of the hub."""
    names = [run["base"]["name"] for run in runs]
    base = next((name for name in reversed(names) if on_the_hub(name)), None)
    sources = [source["path"] for run in runs for source in run["data"].get("train", [])]
    metadata = ModelCardData(
        base_model=base,
        library_name="peft" if adapter else "transformers",
        pipeline_tag=reward.pipeline if reward else "text-generation",
        tags=["halos", *dict.fromkeys(run["loss"] for run in runs), *(["lora"] if adapter else [])],
        datasets=list(dict.fromkeys(name for name in sources if on_the_hub(name))) or None,
    )
    return f"---\n{metadata.to_yaml()}\n---"


def _summary(runs: list[Any], *, adapter: bool) -> str:
    if not runs:
        return "Exported by halos. Nothing was recorded of how it was trained."
    run = runs[-1]
    how = " with LoRA" if run["config"]["peft"]["name"] == "lora" else ""
    data = ", ".join(f"`{source['path']}`" for source in run["data"].get("train", []))
    merged = " This is the adapter alone." if adapter else ""
    merged += " Its forward pass was not proved (train.prove=off)." if run["config"]["train"].get("prove") == "off" else ""
    return f"`{run['base']['name']}`, trained{how} by `loss={run['loss']}` on {data} with halos.{merged}"


def _metrics(run: Mapping[str, Any]) -> str:
    before, after = run["result"].get("before") or {}, run["result"].get("metrics") or {}
    names = [name for name, value in after.items() if isinstance(value, float) and name != "seconds"]
    if not names:
        return ""
    step, of = run["result"].get("step"), after.get("step", "")
    other = f"These weights are of step {step}; the last evaluation before them is of step {of}."
    columns = {f"step {before['step']}" if before else "before": before} if before.get("step") != of else {}
    columns[f"step {of}"] = after
    lines = [f"| {' | '.join([name, *(_short(each.get(name)) for each in columns.values())])} |" for name in names]
    head = [f"| | {' | '.join(columns)} |", f"| --- |{' --- |' * len(columns)}"]
    return "\n".join(["## On held-out data", "", *([other, ""] if of not in ("", step) else []), *head, *lines])


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else ""


def _settings(config: Mapping[str, Any]) -> str:
    rows = []
    for section, names in SETTINGS.items():
        values = dict(config[section])
        if section in ("schedule", "optim") and isinstance(target := values.get("_target_"), str):
            values = {"name": target.rpartition(".")[2], **values}
        if section == "peft" and values["name"] == "none":
            names = ("name",)  # the other keys had no effect
        if section == "train" and values.get("steps") is not None:
            names = tuple(name for name in TRAIN if name != "epochs")  # the number of steps overrides it
        for name in names or values:
            if values.get(name) not in (None, [], {}) and not name.startswith("_"):
                rows.append(f"| {section}.{name} | {values[name]} |")
    return "\n".join(["## Settings", "", "| key | value |", "| --- | --- |", *rows, f"| seed | {config['seed']} |"])


def _changed(run: Mapping[str, Any]) -> str:
    """What the settings were before resumes changed them."""
    lines = [
        f"| {change['from']} | {key} | {old} | {new} |"
        for change in run.get("changed") or [] for key, (old, new) in change["keys"].items()
    ]  # fmt: skip
    if not lines:
        return ""
    return "\n".join(["Resumes have changed settings:", "", "| from | key | was | became |", "| --- | --- | --- | --- |", *lines])


def _lineage(runs: list[Any]) -> str:
    lines = [
        f"1. `{run['base']['name']}` ({run['base']['sha256'][:12]}) → `{run['loss']}`, {run['result']['step']} steps"
        for run in runs
    ]
    return "\n".join(
        ["## Lineage", "", *lines, "", "`lineage.json` has each run's whole configuration, and the hashes of weights and data."]
    )


def _how_to_load(runs: list[Any], *, adapter: bool, reward: RewardKind | None, vocabulary: Vocabulary | None) -> str:
    auto = reward.auto if reward else "AutoModelForCausalLM"
    path_lines = ['path = "path/to/this/directory"  # where this file lies, or the repository\'s name on the hub', ""]
    labels = "".join(f", {name}={value}" for name, value in reward.labels.items()) if reward and adapter else ""
    if adapter:
        base = runs[-1]["base"]["name"] if runs else "BASE"
        lines = ["from peft import PeftModel", f"from transformers import {auto}, AutoTokenizer", "", *path_lines]
        lines += [f'base = {auto}.from_pretrained("{base}"{labels})']
        if vocabulary is not None and vocabulary.new:
            lines = ["import torch", *lines, *_resize_code(vocabulary)]
        lines += ["model = PeftModel.from_pretrained(base, path)"]
    else:
        lines = [f"from transformers import {auto}, AutoTokenizer", "", *path_lines, f"model = {auto}.from_pretrained(path)"]
    lines.append("tokenizer = AutoTokenizer.from_pretrained(path)")
    lines += SCORE if reward is RewardKind.OUTCOME else []
    return "\n".join(["## Load", "", "```python", *lines, "```"])


def _resize_code(vocabulary: Vocabulary) -> list[str]:
    """Return code that adds to a base the embedding rows which the adapter was trained with, as `grow` does."""
    return [
        f"known, size = base.get_input_embeddings().num_embeddings, {vocabulary.size}",
        "if size > known:",
        "    base.resize_token_embeddings(size, mean_resizing=False)",
        f"new = [*{list(vocabulary.new)}, *range(known, size)]  # what the base does not know starts at the mean of the others",
        "for layer in filter(None, (base.get_input_embeddings(), base.get_output_embeddings())):",
        "    for table in layer.parameters():",
        "        table.data[new] = table.data[: min(known, *new)].mean(0, dtype=torch.float64).to(table.dtype)",
    ]
