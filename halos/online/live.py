"""A live loop: every step samples from the policy in training, in this process, and trains on what it said."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from accelerate.utils import gather_object
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from halos.checkpoint import weights
from halos.checkpoint.commit import staged
from halos.config.schema import Config
from halos.data.dataset import Completion as Tokens
from halos.data.dataset import Item
from halos.data.tokenize import Encoder
from halos.errors import UserError
from halos.hooks.base import Run
from halos.logps.model import bare
from halos.merge import merge
from halos.merge.merge_and_prove import case_of
from halos.rollout import feedback, measure
from halos.rollout.engines.hf import HFEngine
from halos.rollout.engines.vllm import ServerEngine
from halos.rollout.prompts import for_round, held_out, read_prompts
from halos.rollout.scorers.score import Labeller
from halos.rollout.servers import refuse_silent
from halos.rollout.types import EVAL, Completion, Request, Row, requests_for, row_of
from halos.rundir import FULL
from halos.types import Comparison, Example, Judgement, Scored

log = logging.getLogger(__name__)

FAR = 100_003  # batches of prompts between those of a step and those that are tried in their place
FEEDBACK: dict[type, str] = {Comparison: feedback.PAIRWISE, Judgement: feedback.BINARY}
ATTEMPTS = 10  # times that other prompts are tried where no sample is better than another


class LiveRows:
    """A step's rows, with what a step asks of a Dataset; other ones at every step."""

    def __init__(self, kind: type[Example]) -> None:
        self.kind = kind
        self.fill([], np.zeros(0, np.int64))

    def fill(self, items: Sequence[Item], groups: np.ndarray) -> None:
        self.items, self.groups = list(items), groups
        self.scored = np.array([[int(each.scored.sum()) for each in item.completions] for item in self.items])
        self.lengths = np.array([[len(item.prompt) + len(each.ids) for each in item.completions] for item in self.items])
        self.rewards = np.array([item.reward for item in self.items])

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, row: int) -> Item:
        return self.items[row]

    def lines(self) -> list[str]:
        return ["what the policy says at every step"]


class Prompts:
    """What a live loop asks, read and tokenised before any model loads. Raises UserError for what is wrong with it."""

    def __init__(self, config: Config, tokenizer: Any, kind: type[Example], max_length: int) -> None:
        assert config.online is not None
        self.max_length = max_length
        self.config, self.online, self.kind, self.tokenizer = config, config.online, kind, tokenizer
        self.encoder = Encoder(tokenizer, max_length=2**31, truncation="drop")
        self.train, dropped = self._fitting(read_prompts(config.data.train, "train"))
        exam = read_prompts(config.data.eval, "eval") if config.data.eval and self.online.eval_prompts else []
        self.exam, also = self._fitting(held_out(exam, count=self.online.eval_prompts, seed=config.seed)) if exam else ([], 0)
        if not self.train:
            raise UserError(f"no prompt leaves room for online.sampler.max_new_tokens={self.online.sampler.max_new_tokens} within"
                            f" {max_length} tokens (train.max_length)")  # fmt: skip
        samples = self.online.samples_per_prompt
        self.per_step = config.train.batch_size // samples
        if not self.per_step:
            raise UserError(
                f"train.batch_size={config.train.batch_size} completions cannot hold the {samples} samples of one prompt"
            )
        if kind is Comparison and samples < 2:
            raise UserError("online.samples_per_prompt: pairs need 2 or more")
        self.line = f"{len(self.train)} prompts, {self.per_step} a step, {samples} samples of each; {len(self.exam)} held out"
        if dropped or also:
            self.line += f"; {dropped + also} prompts leave no room for an answer"

    def _fitting(self, rows: list[Row]) -> tuple[list[Row], int]:
        ids = self.encoder.prompts([(tuple(row["prompt"]), str(row["prompt_id"])) for row in rows])
        room = self.max_length - self.online.sampler.max_new_tokens
        kept = [{**row, "ids": prompt} for row, prompt in zip(rows, ids, strict=True) if len(prompt) <= room]
        return kept, len(rows) - len(kept)

    def requests(self, rows: Sequence[Row], seed: int) -> list[Request]:
        online = self.online
        sampler = online.sampler
        return requests_for(
            rows, [row["ids"] for row in rows], samples=online.samples_per_prompt, temperature=sampler.temperature,
            max_new_tokens=sampler.max_new_tokens, seed=seed,
        )  # fmt: skip


class Live:
    """A source of global batches: `batch(step)` samples and scores them, on every process its share, and all get the same.

    What is sampled is a function of the weights, the seed and the step, so a resumed run goes on as it would have.
    """

    def __init__(
        self, run: Run, prompts: Prompts, labeller: Labeller, server: ServerEngine | None, skeleton: Callable[[], nn.Module]
    ) -> None:
        """`server` samples in the place of this process; `skeleton` makes the policy without weights, for those of a sharded one
        to be gathered in."""
        self.run, self.prompts, self.online, self.config = run, prompts, prompts.online, run.config
        self._skeleton = skeleton
        self.labeller, self.server = labeller, server
        self.rows = LiveRows(prompts.kind)
        self._whole: nn.Module | None = None
        self._served: int | None = None  # the step whose weights a server has

    # --- what a trainer asks ---------------------------------------------------------------------------------------------

    def batch(self, number: int) -> np.ndarray:
        """Samples for step `number` (counted from 0); all of its rows."""
        for attempt in range(ATTEMPTS):
            place = number + attempt * FAR
            chosen = for_round(self.prompts.train, place, count=self.prompts.per_step, samples=self.online.samples_per_prompt,
                               seed=self.config.seed)  # fmt: skip
            scored = self._scored(self.prompts.requests(chosen, self._seed(number, attempt)), chosen)
            self._fill(scored)
            if len(self.rows):
                return np.arange(len(self.rows))
        raise UserError(
            f"step {number}: in {ATTEMPTS} batches of prompts no sample was better than another: more online.samples_per_prompt,"
            " a higher temperature, or other prompts"
        )

    def exam(self) -> dict[str, float]:
        """Held-out prompts, answered greedily; the same numbers on every process."""
        scored = self._scored(self.prompts.requests(self.prompts.exam, 0), self.prompts.exam)
        if self.run.main and self.online.show:
            rows = measure.examples(scored, self.online.show)
            self._show(rows)
            for hook in self.run.hooks.values():
                hook.on_examples(self.run, rows)
        found = measure.of_samples(scored, split=EVAL)
        if "reward" not in found:
            raise UserError(f"none of the {len(scored)} held-out answers has a score: {scored[0].get('problem')}")
        return {**found, "examples": len(scored)}

    def _show(self, rows: Sequence[Row]) -> None:
        """samples.md, for people: a disk that is full costs it, and not the run."""
        try:
            measure.write_examples(self.run.directory.path, rows, f"{self.config.exp_name}, step {self.run.step}")
        except OSError as error:
            if error.errno not in FULL:
                raise
            log.warning("samples.md could not be written: %s", error)

    # --- sampling and scoring --------------------------------------------------------------------------------------------

    def _seed(self, number: int, attempt: int) -> int:
        return (self.config.seed * 1_000_003 + number) * ATTEMPTS + attempt

    def _scored(self, requests: Sequence[Request], prompts: Sequence[Row]) -> list[Row]:
        """A row for each request, in their order, with its tokens and score."""
        made = self.run.accelerator
        mine = list(requests[made.process_index :: made.num_processes])
        by_id = {str(row["prompt_id"]): row for row in prompts}
        found = {}
        for request, completion in self._sample(mine):
            row = row_of(request, completion, by_id[request.key[0]], generator="policy", vocabulary="")
            found[request.key] = {**row, "ids": request.ids}
        for sample, score in self.labeller.score(list(found.values())):
            row = found[(sample["prompt_id"], sample["sample_id"])]
            row |= {"reward": score.value, "labeller": self.labeller.name(), "cost": score.cost}
            row |= {"problem": score.problem} if score.problem else {}
        everyone: dict[Any, Row] = {}
        for part in gather_object([found]):
            everyone |= part
        return [everyone[request.key] for request in requests]

    def _sample(self, requests: list[Request]) -> Iterator[tuple[Request, Completion]]:
        if self.server is not None:
            self._push()
            yield from self.server.sample(requests) if requests else ()
            return
        with self._whole_model() as model:
            if requests:
                sampler = self.online.sampler
                engine = HFEngine(model, self.prompts.tokenizer, batch_size=sampler.batch_size, cache_tokens=sampler.cache_tokens,
                                  top_p=sampler.top_p, top_k=sampler.top_k)  # fmt: skip
                yield from engine.sample(requests)

    @contextmanager
    def _whole_model(self) -> Iterator[PreTrainedModel]:
        """The policy as it is now. What was cut is gathered into a second copy, on every process, for as long as it is used:
        ranks sample different texts, and cannot step through a sharded model together."""
        strategy, module, model = self.run.strategy, self.run.module, self.run.model
        if not strategy.is_sharded:
            yield bare(model)
            return
        self._whole = self._whole if self._whole is not None else self._skeleton()
        state = strategy.gathered(module, trained_only=False, offload=False)
        own = {name: value for name, value in state.items() if not name.startswith(weights.HEAD)}
        self._whole.load_state_dict(own, strict=False, assign=True)
        for name, buffer in model.named_buffers():  # rotary tables and the like, which no state dict holds
            parent, _, last = name.rpartition(".")
            self._whole.get_submodule(parent).register_buffer(last, buffer.detach(), persistent=False)
        whole = bare(self._whole)
        whole.tie_weights()
        try:
            yield whole
        finally:
            self._whole.to("meta")

    # --- rows of a loss's own kind ---------------------------------------------------------------------------------------

    def _fill(self, scored: Sequence[Row]) -> None:
        kind = FEEDBACK.get(self.prompts.kind, feedback.SCALAR)
        given = self.online.feedback
        threshold = feedback.check_threshold(kind, given.threshold)
        made, _ = feedback.make(scored, kind=kind, pairing=given.pairing, threshold=threshold, drop_equal=given.drop_equal,
                                seed=self.config.seed)  # fmt: skip
        by_key = {(row["prompt_id"], row["sample_id"]): row for row in scored}
        numbers = {name: number for number, name in enumerate(dict.fromkeys(row["prompt_id"] for row in scored))}
        items = [self._item(row, by_key, number) for number, row in enumerate(made)]
        self.rows.fill(items, np.array([numbers[row["prompt_id"]] for row in made], np.int64))

    def _item(self, row: Row, samples: dict[tuple[str, int], Row], number: int) -> Item:
        name = f"{row['prompt_id']}#{number}"
        if self.prompts.kind is Comparison:
            order = ("A", "B") if row["label"] else ("B", "A")
            pair = [samples[(row["prompt_id"], row[f"sample_id_{letter}"])] for letter in order]
            return Item(_prompt(pair[0]), tuple(map(_tokens, pair)), True, row["reward_difference"], name)
        sample = samples[(row["prompt_id"], row["sample_id"])]
        if self.prompts.kind is Scored:
            logps = np.array(sample["logps"], np.float32)
            return Item(_prompt(sample), (_tokens(sample),), True, 0.0, name, row["reward"], logps)
        return Item(_prompt(sample), (_tokens(sample),), bool(row.get("label", 1)), 0.0, name)

    # --- a server's weights --------------------------------------------------------------------------------------

    def _push(self) -> None:
        """The policy's weights to the server, once a step, by a directory that both see; with LoRA merged into the base."""
        run, place = self.run, self.run.directory.path / "served"
        if self._served == run.step:
            return
        adapter = isinstance(run.model, PeftModel)
        state = run.strategy.gathered(run.module, trained_only=adapter)
        if run.main:
            with staged(place, main=True, facts={"step": run.step}) as hidden:
                weights.save_weights(hidden, run.model, state, run.vocabulary)
                if adapter:  # unproved: the final save's merge, which is proved, is this one
                    run.tokenizer.save_pretrained(hidden)
                    case = case_of(run.base, hidden / "adapter", run.vocabulary, dtype=bare(run.model).dtype)
                    (hidden / "model").mkdir()
                    merge.merge(case.base, case.adapter, hidden / "model", model=bare(run.model), dtype=case.dtype,
                                vocabulary=case.vocabulary, tokens=case.tokens)  # fmt: skip
            assert self.server is not None
            self.server.load(place / "model")
        self._served = run.step
        run.accelerator.wait_for_everyone()


def server_of(config: Config, tokenizer: PreTrainedTokenizerBase) -> ServerEngine | None:
    """The server that samples, None where this process does. Raises UserError for a sampler that cannot follow a policy."""
    assert config.online is not None
    sampler = config.online.sampler
    if sampler.name == "hf":
        return None
    if sampler.name != "vllm" or sampler.url is None:
        raise UserError("a live loop samples with online.sampler.name=hf, or vllm with online.sampler.url of a running server")
    refuse_silent(sampler.url, "online.sampler.url")
    name = sampler.model or str(config.model.name_or_path)
    return ServerEngine(sampler.url, name, tokenizer, top_p=sampler.top_p, top_k=sampler.top_k, concurrency=sampler.concurrency)


def _prompt(row: Row) -> np.ndarray:
    return np.array(row["ids"], np.int32)


def _tokens(row: Row) -> Tokens:
    ids = np.array(row["output_ids"], np.int32)
    return Tokens(ids, np.ones(len(ids), bool))
