#!/usr/bin/env python3
"""Measure the peak memory of merging a LoRA adapter: streamed by halos, and by PEFT's merge_and_unload + save_pretrained.

    python launch/compare/memory_of_merge.py [--sizes 150 600]

The bases are Llamas with random weights, of about the given MB on disk in bfloat16, each merged in a process of its own. Memory
is the peak resident memory beyond that after all imports; the bound is 2 x the largest tensor + 64 MB. Merging and proving are
measured separately: a proof loads the models, one after the other, as users will.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
MB = 10**6
SHAPES = {150: (512, 1376, 8, 64000), 600: (1024, 2752, 12, 64000)}  # hidden, intermediate, layers, vocabulary


def resident(field: str) -> int:
    """Return VmRSS or VmHWM of this process, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def build(directory: Path, size: int) -> None:
    """Build a base of about `size` MB and a non-zero adapter."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, intermediate, layers, vocabulary = SHAPES.get(size) or (1024, 2752, max(1, round((size - 262) / 25.3)), 64000)
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64, vocab_size=vocabulary, dtype="bfloat16", tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(directory / "base")
    adapted = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.01 * torch.randn(parameter.shape)
    adapted.peft_config["default"].base_model_name_or_path = str(directory / "base")
    adapted.save_pretrained(str(directory / "adapter"))


def ours(directory: Path, output: Path, case: Any) -> None:
    from halos.merge.merge import merge

    output.mkdir()
    merge(case.base, case.adapter, output, model=case.empty_model(), dtype=case.dtype)


def proving(directory: Path, output: Path, case: Any) -> None:
    from halos.merge.proof import prove

    result = prove(case, directory / "ours")
    assert result.holds, result.faults


def theirs(directory: Path, output: Path, case: Any) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(case.base, dtype=case.dtype)
    PeftModel.from_pretrained(model, str(case.adapter)).merge_and_unload().save_pretrained(output)


ROLES = {"ours": ours, "peft": theirs, "proof": proving}


def act(role: str, directory: Path) -> None:
    """Run one role and print its peak memory beyond the imports, in bytes."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401  imports are not measured

    from halos.merge import merge, proof  # noqa: F401

    case = proof.Case(directory / "base", directory / "adapter", None, torch.bfloat16)
    case.empty_model()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak, which so far is that of the imports
    ROLES[role](directory, directory / role, case)
    print(json.dumps(resident("VmHWM") - before))


def alone(role: str, directory: Path) -> int:
    command = [sys.executable, __file__, "--role", role, "--place", str(directory)]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode:
        sys.exit(f"{role} failed:\n{process.stderr[-3000:]}")
    return json.loads(process.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[150, 600], help="MB on disk")
    parser.add_argument("--role", choices=[*ROLES, "build"], help=argparse.SUPPRESS)
    parser.add_argument("--place", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.role:
        act(args.role, args.place) if args.role != "build" else build(args.place, args.sizes[0])
        return
    print("| base | largest tensor | bound | halos merges | PEFT merges | halos proves |\n| --- | --- | --- | --- | --- | --- |")
    for size in args.sizes:
        with tempfile.TemporaryDirectory() as text:
            directory = Path(text)
            subprocess.run([sys.executable, __file__, "--role", "build", "--place", text, "--sizes", str(size)], check=True,
                           capture_output=True)  # fmt: skip
            from halos.merge.safetensors_io import SafeFile

            file = SafeFile(directory / "base" / "model.safetensors")
            largest = max(file.dtype(name).itemsize * _numel(file.shape(name)) for name in file.names)
            whole = file.path.stat().st_size
            numbers = [whole, largest, 2 * largest + 64 * MB, *(alone(role, directory) for role in ("ours", "peft", "proof"))]
        print("| " + " | ".join(f"{number / MB:.0f} MB" for number in numbers) + " |", flush=True)


def _numel(shape: list[int]) -> int:
    product = 1
    for side in shape:
        product *= side
    return product


if __name__ == "__main__":
    main()
