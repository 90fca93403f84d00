"""What both ways to run vLLM share: token ids in, token ids and their log-probs out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halos.config.schema import Sampler
from halos.errors import UserError
from halos.rollout.engines.engine import Engine, stop_ids
from halos.rollout.types import Origin, Request, Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_NUM_SEQS = 256  # sequences that vLLM runs at once by default; more wait in its queue


class TokenEngine(Engine):
    """`stops` are the ids that end a completion of the policy, as its other samplers stop at them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, settings: Sampler, origin: Origin, *, stops: Sequence[int]) -> None:
        self.tokenizer, self.settings, self.origin, self.stops = tokenizer, settings, origin, tuple(stops)

    @property
    def in_flight(self) -> int:
        return self.settings.concurrency or MAX_NUM_SEQS

    def _parameters(self, request: Request) -> dict[str, Any]:
        """Parameters of vLLM's API and of its SamplingParams. Each that moves the distribution is stated, since a server takes
        what a request leaves out from the model's generation_config."""
        return {
            "seed": request.seed % 2**31, "max_tokens": request.max_new_tokens, "temperature": request.temperature,
            "top_p": self.settings.top_p, "top_k": self.settings.top_k or -1, "min_p": 0.0, "repetition_penalty": 1.0,
            "presence_penalty": 0.0, "frequency_penalty": 0.0, "stop_token_ids": list(self.stops), "stop": [], "min_tokens": 0,
            "ignore_eos": False, "logit_bias": None, "bad_words": [], "skip_special_tokens": False, "logprobs": 0,
        }  # fmt: skip

    def _sample(self, request: Request, ids: Sequence[int], logps: Sequence[float], finish: str) -> Sample:
        """The answer to a request. Raises UserError for one that the engine ended by a rule of its own."""
        stopped = finish == "stop"
        if stopped and ids[-1] not in self.stops:
            token = self.tokenizer.convert_ids_to_tokens(int(ids[-1]))
            raise UserError(
                f"{self.where} ended a completion at the token {ids[-1]} ({token!r}), at which the policy does not end one: start"
                " it with --generation-config vllm, without stop tokens of its own"
            )
        if not stopped and len(ids) < request.max_new_tokens:
            asked = request.max_new_tokens
            raise UserError(
                f"{self.where} ended a completion after {len(ids)} tokens ({finish}) where {asked} were asked for:"
                " start it with --generation-config vllm, and a --max-model-len that holds prompts and completions"
            )
        text = self.tokenizer.decode(list(ids[:-1] if stopped else ids), skip_special_tokens=True)
        assert isinstance(text, str)
        finish = "stop" if stopped else "length"
        return Sample.of(request, self.origin, text, finish=finish, tokens=len(ids), ids=ids, logps=logps)

    @property
    def where(self) -> str:
        return "vLLM"


def stops_of(directory: Path, tokenizer: Any) -> list[int]:
    """The ids that end a completion of the policy in `directory`, as the engine hf reads them off the model that it loads."""
    from transformers import GenerationConfig

    from halos.data.tokenize import end_of_turn
    from halos.models.generation import settings_for
    from halos.models.load import read_config

    has_own = (directory / "generation_config.json").is_file()
    own: Any = (
        GenerationConfig.from_pretrained(directory) if has_own else GenerationConfig.from_model_config(read_config(directory))
    )
    return stop_ids(settings_for(own, tokenizer, end_of_turn(tokenizer)), tokenizer)
