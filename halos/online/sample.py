"""Sample completions of prompts: python -m halos.online.sample MODEL --data prompts.jsonl --output samples.jsonl -n 8

Killed and given again, the same command goes on: what was sampled is kept. Under accelerate launch every process samples its
share with a whole model of its own.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from halos.confined import expanded
from halos.distributed.children import leave
from halos.errors import UserError, command
from halos.online.records import Ledger
from halos.rollout.prompts import read_prompts
from halos.rollout.ranks import Ranks, device_of_this_process
from halos.rollout.types import TRAIN, Completion, Engine, Request, Row, requests_for, row_of

CHUNK = 4  # batches that are sampled and kept together: what a crash can lose


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m halos.online.sample", description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    made.add_argument("model", help="a directory, a hub id, a .gguf file, or tiny")
    made.add_argument("--data", nargs="+", required=True, help="files, directories or names, as data.train takes them")
    made.add_argument("--split", default="train", choices=("train", "eval"), help="of data that has splits")
    made.add_argument("--limit", type=int, help="the first so many prompts (default: all)")
    made.add_argument("--output", type=Path, required=True, help=".jsonl, or .json for a list as HALOs' files hold it")
    made.add_argument("-n", "--samples", type=int, default=1, help="completions of each prompt (default 1)")
    made.add_argument("--temperature", type=float, default=1.0, help="0: the likeliest token each time (default 1)")
    made.add_argument("--top-p", type=float, default=1.0)
    made.add_argument("--top-k", type=int, default=0, help="0: all tokens (default)")
    made.add_argument("--max-new-tokens", type=int, default=256)
    made.add_argument("--max-length", type=int, help="of prompt and completion, in tokens (default: what the model was made for)")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--chat-template", help="jinja, or a file of it (default: the model's own)")
    made.add_argument("--revision")
    made.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    made.add_argument("--batch-size", type=int, default=64, help="sequences that are continued at once (default 64)")
    made.add_argument("--cache-tokens", type=int, default=32768, help="tokens in the engine's cache (default 32768)")
    made.add_argument("--sampler", default="hf", choices=("hf", "vllm", "openai"))
    made.add_argument("--python", help="the interpreter that has vllm (launch/requirements-vllm.txt)")
    made.add_argument("--url", help="of an OpenAI-compatible server, ending in /v1; with --sampler vllm of a vLLM server")
    made.add_argument("--served-model", help="the model's name at that server (default: MODEL)")
    made.add_argument("--concurrency", type=int, default=16, help="requests to a server at once (default 16)")
    made.add_argument("--reference", help="a model that --kl-samples compares with")
    made.add_argument("--reference-revision")
    made.add_argument("--kl-samples", type=int, default=0, help="estimate the KL to the reference from so many samples")
    made.add_argument("--cache-dir", type=Path, default=Path("~/.cache/halos"))
    made.add_argument("--overwrite", action="store_true", help="sample anew where the output is there already")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    return command(lambda: run(parser().parse_args(arguments)), stopped="what was sampled is kept, and the same command goes on")


def run(given: argparse.Namespace) -> int:
    """One output file. Raises UserError for what is wrong, before any model loads where that is possible."""
    _check(given)
    prompts = read_prompts(given.data, given.split)[: given.limit]
    if not prompts:
        raise UserError(f"--data {' '.join(given.data)} has no prompts")
    ranks, began = Ranks(), time.perf_counter()
    if given.overwrite and ranks.main:
        given.output.unlink(missing_ok=True)
    source = Source(given, ranks)
    ledger = Ledger(given.output, source.request(prompts), rank=ranks.rank)
    if ranks.first(ledger.is_done()):
        say(ranks, f"{given.output} is there already, of this very request")
        ranks.wait()
        return 0
    if ranks.main:
        ledger.open()
    ranks.wait()
    if not ranks.main:
        ledger.open()
    if own := sum("samples" in row or "temperature" in row for row in prompts):
        say(ranks, f"{own} of {len(prompts)} prompts say themselves how many samples they want, or at what temperature")
    requests, too_long = source.requests(prompts)
    _sample(requests, source, ledger, ranks, {str(row["prompt_id"]): row for row in prompts})
    ranks.wait()
    ledger.open()  # what the others have kept
    divergence = source.divergence(ledger, requests)
    if ranks.main:
        rows = [ledger.rows[request.key] for request in requests]
        facts = {**counts(rows), "prompts": len(prompts), "prompts_too_long": too_long, **divergence}
        seconds = time.perf_counter() - began
        ledger.finish([request.key for request in requests], {**facts, "seconds": round(seconds, 2)})
        long = f", {too_long} prompts too long for {given.max_new_tokens} more tokens" if too_long else ""
        say(ranks, f"{given.output}: {facts['samples']} samples of {len(prompts) - too_long} prompts{long},"
                   f" {facts['cut']} cut at --max-new-tokens, {facts['empty']} empty; {seconds:.1f} s,"
                   f" {facts['tokens'] / seconds:.0f} tokens/s")  # fmt: skip
    ranks.wait()
    return 0


def say(ranks: Ranks, text: str) -> None:
    if ranks.main:
        tqdm.write(text, file=sys.stderr)


def _check(given: argparse.Namespace) -> None:
    for name, least in (("samples", 1), ("max_new_tokens", 1), ("batch_size", 1), ("top_k", 0), ("temperature", 0),
                        ("cache_tokens", 64), ("kl_samples", 0)):  # fmt: skip
        value = getattr(given, name)
        if not value >= least or math.isinf(value):
            raise UserError(f"--{name.replace('_', '-')} takes a number from {least} on, not {value}")
    if not 0 < given.top_p <= 1:
        raise UserError(f"--top-p takes a number above 0 and at most 1, not {given.top_p}")
    if given.temperature == 0 and given.samples > 1:
        raise UserError("--temperature 0 gives the same text each time: give -n 1, or a temperature")
    if given.sampler == "openai" and not given.url:
        raise UserError("--sampler openai needs --url, such as http://localhost:8000/v1")
    if given.sampler == "vllm" and not given.url and not given.python:
        raise UserError(
            "--sampler vllm needs --python, an interpreter with vllm: python -m venv .vllm && .vllm/bin/pip install -r"
            " launch/requirements-vllm.txt, then --python .vllm/bin/python; or --url of a running server"
        )
    if given.kl_samples and not given.reference:
        raise UserError("--kl-samples needs --reference, the model to compare with")


def counts(rows: Sequence[Row]) -> dict[str, Any]:
    """What the samples are like."""
    return {
        "samples": len(rows),
        "tokens": sum(row["tokens"] for row in rows),
        "cut": sum(row["finish"] == "length" for row in rows),
        "empty": sum(not row["output"].strip() for row in rows),
    }


class Source:
    """The model behind the samples: where it lies, what it is fed, and the engine that continues it."""

    def __init__(self, given: argparse.Namespace, ranks: Ranks) -> None:
        self.given, self.ranks = given, ranks
        self._tokenizer: Any = None
        self._place: Path | None = None
        self._vocabulary = ""
        if given.sampler != "openai":
            from halos.checkpoint import received
            from halos.data.template import chat_template
            from halos.data.tokenize import vocabulary_of
            from halos.models.load import load_tokenizer
            from halos.models.locate import locate

            logging.getLogger("transformers").setLevel(logging.ERROR)
            cache = expanded(given.cache_dir)
            if ranks.main:
                locate(given.model, given.revision, cache)
            ranks.wait()
            self._place = locate(given.model, given.revision, cache)
            if ranks.main:
                received.check_all([("MODEL", self._place), ("--reference", given.reference)], cache)
            self._tokenizer, _ = load_tokenizer(self._place, add_tokens=[])
            self._tokenizer.chat_template = chat_template(self._tokenizer, given.chat_template)
            self._vocabulary = vocabulary_of(self._tokenizer)

    def request(self, prompts: Sequence[Row]) -> dict[str, Any]:
        """Everything that decides what the samples are."""
        from halos.checkpoint.lineage import identity

        given = self.given
        weights = self.ranks.first(identity(self._place, given.cache_dir) if self._place and self.ranks.main else None)
        asked = [[row["prompt_id"], row["prompt"], row.get("samples"), row.get("temperature")] for row in prompts]
        return {
            "sampler": given.sampler, "model": None if weights else str(given.model), "model_sha256": weights,
            "prompts": _digest(asked),
            "samples": given.samples, "temperature": given.temperature, "top_p": given.top_p, "top_k": given.top_k,
            "max_new_tokens": given.max_new_tokens, "max_length": given.max_length, "seed": given.seed,
            "template": _digest(self._tokenizer.chat_template) if self._tokenizer is not None else None, "dtype": given.dtype,
        }  # fmt: skip

    def requests(self, prompts: Sequence[Row]) -> tuple[list[Request], int]:
        """One for each sample, and how many prompts leave no room for an answer."""
        given = self.given
        ids: list[np.ndarray] = [np.zeros(0, np.int32)] * len(prompts)
        longest = math.inf
        if self._place is not None:
            from halos.data.tokenize import Encoder
            from halos.models.load import read_config

            encoder = Encoder(self._tokenizer, max_length=2**31, truncation="drop")
            ids = encoder.prompts([(tuple(row["prompt"]), str(row["prompt_id"])) for row in prompts])
            limits = [given.max_length, getattr(read_config(self._place).get_text_config(), "max_position_embeddings", None)]
            longest = min([limit for limit in limits if limit] or [math.inf])
        fitting = [n for n, prompt in enumerate(ids) if len(prompt) + given.max_new_tokens <= longest]
        if not fitting:
            raise UserError(f"no prompt leaves room for --max-new-tokens {given.max_new_tokens} within {longest} tokens")
        made = requests_for(
            [prompts[n] for n in fitting], [ids[n] for n in fitting], samples=given.samples, temperature=given.temperature,
            max_new_tokens=given.max_new_tokens, seed=given.seed,
        )  # fmt: skip
        return made, len(prompts) - len(fitting)

    def engine(self) -> Engine:
        given = self.given
        if given.sampler == "hf":
            return self._hf()
        if given.sampler == "openai":
            from halos.rollout.engines.openai import ChatEngine

            return ChatEngine(given.url, given.served_model or given.model, top_p=given.top_p, concurrency=given.concurrency)
        from halos.rollout.engines.vllm import ServerEngine, SubprocessEngine

        if given.url:
            return ServerEngine(
                given.url, given.served_model or given.model, self._tokenizer, top_p=given.top_p, top_k=given.top_k,
                concurrency=given.concurrency,
            )  # fmt: skip
        return SubprocessEngine(given.python, str(self._place), self._tokenizer, top_p=given.top_p, top_k=given.top_k)

    def _hf(self) -> Engine:
        from halos.rollout.engines.hf import HFEngine

        model, given = self.load(self._place), self.given
        return HFEngine(
            model, self._tokenizer, batch_size=given.batch_size, cache_tokens=given.cache_tokens, top_p=given.top_p,
            top_k=given.top_k,
        )  # fmt: skip

    def load(self, place: Path | None) -> Any:
        from transformers.utils import logging as transformers_logging

        from halos.data.tokenize import end_of_turn
        from halos.distributed.device import has_bfloat16
        from halos.models.load import load_model, weights_dtype

        transformers_logging.disable_progress_bar()
        assert place is not None
        device = device_of_this_process()
        dtype = weights_dtype(self.given.dtype, trained=False, half=has_bfloat16())
        model: Any = load_model(
            place, self._tokenizer, reward=False, dtype=dtype, attention="sdpa", stops=end_of_turn(self._tokenizer)
        )
        return model.to(device).eval()

    def row(self, request: Request, completion: Completion, prompt: Row) -> Row:
        return row_of(request, completion, prompt, generator=str(self.given.model), vocabulary=self._vocabulary)

    def divergence(self, ledger: Ledger, requests: Sequence[Request]) -> dict[str, Any]:
        """log pi / pi_ref of whole completions, in the mean over some samples: an estimate of the KL, nats a completion."""
        given = self.given
        if not given.kl_samples or not given.temperature or not self.ranks.main or self._place is None:
            return {}
        from halos.models.locate import locate
        from halos.rollout.kl import mean_log_ratio

        place = locate(given.reference, given.reference_revision, expanded(given.cache_dir))
        if place == self._place:
            return {"kl": 0.0, "kl_samples": 0}
        kept = [(request, ledger.rows[request.key]) for request in requests]
        some = [(request.ids, row["output_ids"], row["logps"]) for request, row in kept
                if row.get("logps") and row.get("split", TRAIN) == TRAIN]  # fmt: skip
        some = some[:: max(1, len(some) // given.kl_samples)][: given.kl_samples]
        if not some:
            return {}
        return {"kl": mean_log_ratio(self.load(place), some, given.temperature), "kl_samples": len(some)}


def _sample(
    requests: Sequence[Request], source: Source, ledger: Ledger, ranks: Ranks, prompts: dict[str, Row]
) -> None:  # fmt: skip
    """Every request that is not answered yet, some batches at a time: a chunk holds the same requests after any crash."""
    size = CHUNK * source.given.batch_size
    chunks = [requests[start : start + size] for start in range(0, len(requests), size)]
    mine = [chunk for chunk in chunks[ranks.rank :: ranks.world] if any(each.key not in ledger.rows for each in chunk)]
    if not mine:
        return
    engine = source.engine()
    bar = tqdm(total=sum(map(len, mine)), desc="sampling", unit="sample", delay=1, disable=None if ranks.main else True)
    single = source.given.sampler == "openai"  # each answer was paid for: it is kept at once
    with bar:
        for chunk in mine:
            found: dict[Any, Row] = {}
            asked = [each for each in chunk if each.key not in ledger.rows] if single else chunk
            for request, completion in engine.sample(asked):
                bar.update()
                if request.key not in ledger.rows:
                    found[request.key] = source.row(request, completion, prompts[request.key[0]])
                if single:
                    ledger.add(found)
                    found = {}
            if found:
                ledger.add(found)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


if __name__ == "__main__":
    leave(main())
