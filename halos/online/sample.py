"""Sample completions of prompts: python -m halos.online.sample MODEL --data prompts.jsonl --output samples.jsonl -n 8

If it is killed, the same command resumes: samples so far are kept. Under accelerate launch every rank samples a shard of the
prompts, with a full model of its own.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import math
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from halos.config.idle_online import idle_sampler_keys, without_length
from halos.config.rollout_modules import engine_class
from halos.config.schema import Sampler, mathematics
from halos.confined import expanded
from halos.distributed.children import exit_process
from halos.errors import UserError, command
from halos.online.options import SAMPLER, day
from halos.online.records import FileStore, ResumableFile, open_on_all_ranks
from halos.online.rescored import RescoringPolicy, device_beside, divergence
from halos.rollout import collect
from halos.rollout.engines.engine import Engine, open_engine
from halos.rollout.measure import sample_counts
from halos.rollout.prompts import answer, columns_digest, fitting, read_prompts, room_for_prompts
from halos.rollout.ranks import Ranks, local_device
from halos.rollout.types import Origin, Prompt, Request, Row, Sample, requests_for

CHUNK = 4  # batches that are sampled and stored together by an engine that shares batches: what a crash can lose


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(prog="python -m halos.online.sample", description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    options.add_argument("model", help="a directory, a hub id, a .gguf file, or tiny")
    options.add_argument("--data", nargs="+", required=True, help="files, directories or names, as in data.train")
    options.add_argument("--split", default="train", choices=("train", "eval"), help="of data that has splits")
    options.add_argument("--limit", type=int, help="use only the first N prompts (default: all)")
    options.add_argument("--output", type=Path, required=True, help=".jsonl, or .json for a list as in HALOs' files")
    options.add_argument("-n", "--samples", type=int, default=1, help="completions of each prompt (default 1)")
    options.add_argument("--max-length", type=int, help="of prompt and completion, in tokens (default: the model's positions)")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--chat-template", help="jinja, or a file of it (default: the model's own)")
    options.add_argument("--chat-template-kwargs", type=json.loads, default={}, help="JSON: what it gets besides the turns")
    options.add_argument("--system", default="keep", choices=("keep", "merge"), help="merge: into the first user turn")
    options.add_argument("--date", type=day, help="what the chat template writes as the current date (default: today)")
    options.add_argument("--revision")
    options.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    options.add_argument("--reference", help="the model to which --kl-samples estimates the KL")
    options.add_argument("--reference-revision")
    options.add_argument("--previous", help="the policy before this one, which a server may still have: it is refused")
    options.add_argument("--previous-revision")
    options.add_argument("--kl-samples", type=int, default=0, help="samples from which to estimate the KL to the reference")
    options.add_argument("--rescore", type=int, default=8, help="samples compared with the policy's own log-probs; 0: none (8)")
    options.add_argument("--cache-dir", type=Path, default=Path("~/.cache/halos"))
    options.add_argument("--overwrite", action="store_true", help="replace an existing output")
    SAMPLER.add(options.add_argument_group("online.sampler", "the keys of a configuration; --temperature 0 is greedy"))
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    return command(lambda: run(parser().parse_args(arguments)), stopped="samples so far are kept, and the same command resumes")


def run(args: argparse.Namespace) -> int:
    """Write one file of samples. Raises UserError for wrong input, before any model loads where that is possible."""
    sampler = _checked(args)
    prompts = read_prompts(args.data, args.split)[: args.limit]
    if not prompts:
        raise UserError(f"--data {' '.join(args.data)} has no prompts")
    ranks = Ranks.of_stage()
    if args.overwrite and ranks.main:
        args.output.unlink(missing_ok=True)
    policy = Policy(args, sampler, ranks)
    file = ResumableFile(args.output, policy.request(prompts), rank=ranks.rank, recorded_since=("columns",))
    if ranks.from_rank_0(file.is_done()):
        say(ranks, f"{args.output} exists already, with the samples of this request")
        ranks.barrier()
        return 0
    open_on_all_ranks(file, ranks)
    if own := sum(prompt.samples is not None or prompt.temperature is not None for prompt in prompts):
        say(ranks, f"{own} of {len(prompts)} prompts set their own number of samples or temperature")
    requests, too_long = policy.requests(prompts)
    earlier = {*file.rows}
    seconds = _sample(requests, policy, file, ranks)
    file.open()  # read the samples of the other ranks
    compared, more = policy.compared(file, requests) if ranks.main else ({}, 0.0)
    facts = {"prompts": len(prompts), "prompts_too_long": too_long, "sampled_earlier": len(earlier), **compared}
    if ranks.main:
        now = sum(row["tokens"] for key, row in file.rows.items() if key not in earlier)
        _finish(args, file, requests, {**facts, "seconds": round(seconds + more, 2)}, tokens_per_second=now / max(seconds, 1e-3))
    ranks.barrier()
    return 0


def say(ranks: Ranks, text: str) -> None:
    if ranks.main:
        tqdm.write(text, file=sys.stderr)


def _checked(args: argparse.Namespace) -> Sampler:
    """The sampler's settings. Raises UserError for arguments that contradict each other."""
    for name, least in (("samples", 1), ("kl_samples", 0), ("rescore", 0)):
        if getattr(args, name) < least:
            raise UserError(f"--{name.replace('_', '-')} takes a number from {least} on, not {getattr(args, name)}")
    sampler = SAMPLER.read(args)
    if sampler.temperature == 0 and args.samples > 1:
        raise UserError("--temperature 0 gives the same text each time: give -n 1, or a temperature")
    if complaint := engine_class(sampler.name).problem(sampler, SAMPLER.flag) or without_length(sampler, SAMPLER.flag):
        raise UserError(complaint)
    if idle := idle_sampler_keys(sampler):
        raise UserError(f"{SAMPLER.flag(idle[0])} has no effect with --sampler {sampler.name}: leave it out")
    if args.kl_samples and not args.reference:
        raise UserError("--kl-samples needs --reference, the model to compare with")
    return sampler


def _sample(requests: Sequence[Request], policy: Policy, file: ResumableFile, ranks: Ranks) -> float:
    """Sample this rank's share of the requests that have no sample yet. Return the seconds until the last rank was done, without
    the start of the engine."""
    size = CHUNK * policy.sampler.batch_size if engine_class(policy.sampler.name).shares_batches else 1
    store = FileStore[Sample](file)
    chunks = [requests[start : start + size] for start in range(0, len(requests), size)]
    mine = [chunk for chunk in chunks[ranks.rank :: ranks.world] if not all(store.has(each.key) for each in chunk)]
    with (
        closing(policy.engine()) if mine else nullcontext() as engine,
        tqdm(total=sum(map(len, mine)), desc="sampling", unit="sample", delay=1, disable=None if ranks.main else True) as bar,
    ):
        if engine is not None and policy.args.rescore and ranks.main:
            policy.rescoring.refuse_other(engine, requests, str(policy.args.model), policy.previous())
        began = time.perf_counter()
        for _ in collect.sample(mine, engine, store) if engine is not None else ():
            bar.update()
        ranks.barrier()
        return time.perf_counter() - began


def _finish(
    args: argparse.Namespace, file: ResumableFile, requests: Sequence[Request], facts: Row, *, tokens_per_second: float
) -> None:  # fmt: skip
    """Write the file and its meta.json, and print a summary."""
    too_long, earlier = facts["prompts_too_long"], facts["sampled_earlier"]
    facts = {**sample_counts([file.rows[request.key] for request in requests]), **facts}
    file.finish([request.key for request in requests], facts)
    resumed = f" for all but {earlier} that were sampled before" if earlier else ""
    long = f", {too_long} prompts leave no room for {answer(args.max_new_tokens, '--max-new-tokens ')}" if too_long else ""
    tqdm.write(f"{args.output}: {facts['samples']} samples of {facts['prompts'] - too_long} prompts{long},"
               f" {facts['cut']} cut at --max-new-tokens, {facts['empty']} empty; {facts['seconds']:.1f} s{resumed},"
               f" {tokens_per_second:.0f} tokens/s", file=sys.stderr)  # fmt: skip


class Policy:
    """The policy to sample from: its files and tokenizer, its requests, and its engine."""

    def __init__(self, args: argparse.Namespace, sampler: Sampler, ranks: Ranks) -> None:
        self.args, self.sampler, self.ranks = args, sampler, ranks
        self.tokenizer: Any = None
        self.directory: Path | None = None
        self.origin = Origin(str(args.model))
        self.rescoring = RescoringPolicy(partial(self._model, beside=True))
        if engine_class(sampler.name).reads_tokens:
            self._locate()

    def _locate(self) -> None:
        from halos.checkpoint import integrity
        from halos.data.template import template_of_run
        from halos.data.tokenize import vocabulary_of
        from halos.models.load import load_tokenizer
        from halos.models.locate import locate

        args, ranks = self.args, self.ranks
        logging.getLogger("transformers").setLevel(logging.ERROR)
        cache = expanded(args.cache_dir)
        if ranks.main:
            locate(args.model, args.revision, cache)
        ranks.barrier()
        self.directory = locate(args.model, args.revision, cache)
        if ranks.main:
            integrity.check_all([("MODEL", self.directory), ("--reference", args.reference)], cache)
        self.tokenizer, _ = load_tokenizer(self.directory, add_tokens=[])
        given = args.chat_template, args.chat_template_kwargs, args.system, args.date
        self.tokenizer.chat_template = template_of_run(self.tokenizer, *given)
        self.origin = Origin(str(args.model), vocabulary_of(self.tokenizer))

    def request(self, prompts: Sequence[Prompt]) -> dict[str, Any]:
        """Everything that the samples depend on, as JSON."""
        from halos.checkpoint.lineage import identity

        args = self.args
        weights = self.ranks.from_rank_0(identity(self.directory, args.cache_dir) if self.directory and self.ranks.main else None)
        rows = [[prompt.id, prompt.turns, prompt.samples, prompt.temperature, *([] if prompt.seed is None else [prompt.seed])]
                for prompt in prompts]  # fmt: skip
        settings = mathematics(self.sampler)
        return {
            "sampler": settings.pop("name"), **settings, "model": None if weights else str(args.model), "model_sha256": weights,
            "prompts": _digest(rows), "columns": columns_digest(prompts)[:16], "samples": args.samples,
            "max_length": args.max_length, "seed": args.seed,
            "template": _digest(self.tokenizer.chat_template) if self.tokenizer is not None else None, "dtype": args.dtype,
        }  # fmt: skip

    def requests(self, prompts: Sequence[Prompt]) -> tuple[list[Request], int]:
        """Requests for the prompts that leave room for an answer, and how many do not. Raises UserError where none does."""
        args, sampler, total, longest = self.args, self.sampler, len(prompts), math.inf
        if self.directory is not None:
            from halos.data.tokenize import Encoder
            from halos.models.load import read_config

            encoder = Encoder(self.tokenizer, max_length=2**31, truncation="drop")
            limits = [args.max_length, getattr(read_config(self.directory).get_text_config(), "max_position_embeddings", None)]
            longest = min([limit for limit in limits if limit] or [math.inf])
            if sampler.max_new_tokens is None and longest == math.inf:
                raise UserError("--max-new-tokens null is what the length of the model leaves, and its config names none: give"
                                " --max-length")  # fmt: skip
            prompts = fitting(prompts, encoder, room_for_prompts(sampler.max_new_tokens, longest))
            if not prompts:
                wanted = answer(sampler.max_new_tokens, "--max-new-tokens ")
                raise UserError(f"no prompt leaves room for {wanted} within {longest} tokens")
        requests = requests_for(prompts, samples=args.samples, temperature=sampler.temperature,
                                max_new_tokens=sampler.max_new_tokens, max_length=longest, seed=args.seed)  # fmt: skip
        return requests, total - len(prompts)

    def engine(self) -> Engine:
        return open_engine(self.sampler, self.origin, directory=self.directory, tokenizer=self.tokenizer, model=self._model,
                           dtype=self._dtype() if self.directory is not None else "auto")  # fmt: skip

    def _dtype(self) -> str:
        from halos.distributed.device import has_bfloat16
        from halos.models.load import weights_dtype

        return str(weights_dtype(self.args.dtype, trained=False, half=has_bfloat16())).removeprefix("torch.")

    def _model(self, *, beside: bool = False) -> Any:
        """The policy; `beside` another engine, whose memory it leaves alone."""
        assert self.directory is not None
        if self.rescoring.model is None:
            self.rescoring.model = self.load(self.directory, device_beside(self.directory) if beside else None)
        return self.rescoring.model

    def load(self, directory: Path, device: Any = None) -> Any:
        import torch
        from transformers.utils import logging as transformers_logging

        from halos.data.tokenize import end_of_turn
        from halos.models.load import load_model

        transformers_logging.disable_progress_bar()
        dtype: torch.dtype = getattr(torch, self._dtype())
        model: Any = load_model(
            directory, self.tokenizer, reward=None, dtype=dtype, attention="sdpa", stops=end_of_turn(self.tokenizer)
        )
        return model.to(device if device is not None else local_device()).eval()

    def previous(self) -> Callable[[], Any] | None:
        """Loads the policy before this one; None where none is known or it is the same."""
        if self.args.previous is None or self.directory is None:
            return None
        from halos.models.locate import locate

        directory = locate(self.args.previous, self.args.previous_revision, expanded(self.args.cache_dir))
        return None if directory == self.directory else lambda: self.load(directory, device_beside(directory))

    def compared(self, file: ResumableFile, requests: Sequence[Request]) -> tuple[dict[str, Any], float]:
        """What the samples are beside the policy's own log-probs, and beside the reference's. And the seconds that it took, once
        these were loaded."""
        count = self.args.rescore if self.directory is not None else 0
        facts = self.rescoring.mismatch([file.rows[request.key] for request in requests], requests, self.sampler, count)
        self.rescoring.model = None  # the reference takes its room
        divergence, more = self.divergence(file, requests)
        return facts | divergence, self.rescoring.seconds + more

    def divergence(self, file: ResumableFile, requests: Sequence[Request]) -> tuple[dict[str, Any], float]:
        args, temperature = self.args, self.sampler.temperature
        if not args.kl_samples or not temperature or self.directory is None:
            return {}, 0.0
        from halos.models.locate import locate

        directory = locate(args.reference, args.reference_revision, expanded(args.cache_dir))
        if directory == self.directory:
            return {"kl": 0.0, "kl_samples": 0}, 0.0
        kept = [(request, file.rows[request.key]) for request in requests]
        return divergence(kept, partial(self.load, directory), temperature, args.kl_samples)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


if __name__ == "__main__":
    exit_process(main())
