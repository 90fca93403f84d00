"""Compare tokens per second of the default sampling engine and batched `generate`, and of a reward model in batches and singly.

    python launch/compare/sampling.py MODEL [--prompts 32 --samples 4 --new-tokens 48]

Both sides alternate on the same prompts of the bundled arithmetic, with the same number of new tokens per completion.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from transformers import AutoModelForSequenceClassification

from halos.config.defaults import section
from halos.config.schema import Sampler, Scorer
from halos.data import arithmetic
from halos.data.tokenize import Encoder
from halos.models.load import load_model, load_tokenizer
from halos.models.locate import locate
from halos.rollout.engines.hf import HFEngine
from halos.rollout.prompts import fitting
from halos.rollout.scorers.reward_model import RewardModel
from halos.rollout.types import Origin, Prompt, Sample, requests_for


def seconds(work: Callable[[], int]) -> tuple[float, int]:
    began = time.perf_counter()
    done = work()
    return time.perf_counter() - began, done


def sampling(place: Path, arguments: argparse.Namespace) -> None:
    tokenizer, _ = load_tokenizer(place, add_tokens=[])
    model: Any = load_model(place, tokenizer, reward=None, dtype=torch.float32, attention="sdpa").eval()
    asked = [
        Prompt(str(n), tuple(row["prompt"])) for n, row in zip(range(arguments.prompts), arithmetic.rows("eval"), strict=False)
    ]
    prompts = fitting(asked, Encoder(tokenizer, max_length=4096, truncation="drop"), 4096)
    requests = requests_for(prompts, samples=arguments.samples, temperature=1.0, max_new_tokens=arguments.new_tokens, seed=0)
    engine = HFEngine(model, tokenizer, section(Sampler, batch_size=arguments.batch_size), Origin("policy"))
    tokenizer.padding_side = "left"

    def ours() -> int:
        return sum(sample.tokens or 0 for sample in engine.sample(requests))

    @torch.no_grad()
    def plain() -> int:
        count = 0
        for start in range(0, len(requests), arguments.batch_size):
            some = requests[start : start + arguments.batch_size]
            batch = tokenizer.pad({"input_ids": [list(request.ids) for request in some]}, return_tensors="pt")
            out = model.generate(**batch, max_new_tokens=arguments.new_tokens, do_sample=True, temperature=1.0, top_k=0)
            new = out[:, batch["input_ids"].shape[1] :]
            ends = (new == tokenizer.eos_token_id).cumsum(1)
            count += int(((ends == 0) | ((ends == 1) & (new == tokenizer.eos_token_id))).sum())
        return count

    rates: dict[str, list[float]] = {"halos hf": [], "generate": []}
    for _ in range(arguments.turns):
        for name, work in (("halos hf", ours), ("generate", plain)):
            spent, tokens = seconds(work)
            rates[name].append(tokens / spent)
    one, other = max(rates["halos hf"]), max(rates["generate"])
    print(f"sampling   {one:.0f} tokens/s, generate {other:.0f}; ratio {one / other:.2f} (best of {arguments.turns} turns each)")


def scoring(place: Path, arguments: argparse.Namespace) -> None:
    tokenizer, _ = load_tokenizer(place, add_tokens=[])
    with tempfile.TemporaryDirectory() as directory:
        made: Any = AutoModelForSequenceClassification.from_pretrained(place, num_labels=1)
        made.config.pad_token_id = tokenizer.pad_token_id
        made.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        rows = [Sample(Prompt(str(n), tuple(row["prompt"])), 0, row["chosen"][0]["content"] + " so" * (7 * n % 40))
                for n, row in zip(range(arguments.scores), arithmetic.rows("eval"), strict=False)]  # fmt: skip
        rates = {}
        for size in (16, 1):
            scorer = RewardModel(Path(directory), section(Scorer, batch_size=size), max_length=None, quiet=True)
            list(scorer.score(rows[:4]))  # loads the model
            spent, _ = seconds(lambda scorer=scorer: len(list(scorer.score(rows))))
            rates[size] = len(rows) / spent
        print(f"scoring    {rates[16]:.1f} samples/s, one at a time {rates[1]:.1f}; ratio {rates[16] / rates[1]:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a directory, or tiny")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--scores", type=int, default=64)
    parser.add_argument("--turns", type=int, default=2)
    arguments = parser.parse_args()
    place = locate(arguments.model, None, Path("~/.cache/halos").expanduser())
    sampling(place, arguments)
    scoring(place, arguments)


if __name__ == "__main__":
    main()
