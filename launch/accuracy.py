#!/usr/bin/env python3
"""The accuracy (exact match) of a model's greedy answers on the evaluation problems of arithmetic, and some of the answers.

    python launch/accuracy.py runs/demo/FINAL --problems 200 --show 3

Loads the directory as any user would, with plain from_pretrained.
"""

import argparse
import itertools
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from halos.data import arithmetic
from halos.rollout.rewards import exact_match


@torch.no_grad()
def answers(directory: str, questions: list[list[dict[str, str]]], batch_size: int, new_tokens: int) -> list[str]:
    """Return the model's greedy completion of each question."""
    tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto").eval()
    completions = []
    for start in range(0, len(questions), batch_size):
        some = questions[start : start + batch_size]
        inputs = tokenizer.apply_chat_template(
            some, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        tokens = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
        completions += tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return completions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model directory")
    parser.add_argument("--problems", type=int, default=200)
    parser.add_argument("--show", type=int, default=3, help="completions to print")
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--json", action="store_true", help="print one JSON line instead")
    arguments = parser.parse_args()
    rows = list(itertools.islice(arithmetic.rows("eval"), arguments.problems))
    completions = answers(arguments.model, [row["prompt"] for row in rows], arguments.batch_size, arguments.new_tokens)
    solutions = [{"solution": row["chosen"][0]["content"]} for row in rows]
    right = [exact_match(text, solution) == 1 for text, solution in zip(completions, solutions, strict=True)]
    accuracy = sum(right) / len(right)
    if arguments.json:
        print(json.dumps({"model": arguments.model, "problems": len(right), "exact_match": accuracy}))
        return
    print(f"{arguments.model}: {sum(right)} of {len(right)} evaluation problems right ({accuracy:.1%})")
    for text, row, is_right in itertools.islice(zip(completions, rows, right, strict=True), arguments.show):
        print(f"  {row['prompt'][0]['content']}\n    {'right' if is_right else 'wrong'}: {' / '.join(text.strip().splitlines())}")


if __name__ == "__main__":
    main()
