"""A server that speaks vLLM's API over a small model, as well or as badly as a test asks.

The protocol is that of `vllm serve` 0.10.2 to 0.28: a sampling parameter that a request leaves out is taken from the server's
generation config (vLLM's `--generation-config auto` reads the model's); log-probs are those before temperature and penalties
unless it was started with `--logprobs-mode processed_logprobs`; /collective_rpc and /reset_prefix_cache are of development mode.
"""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

DEFAULTS = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "temperature": 1.0, "top_p": 1.0,
            "top_k": 0, "min_p": 0.0}  # fmt: skip
REFUSED, MISSING, BROKEN = 400, 404, 503


@dataclass
class Behaviour:
    """What is wrong with a server; by default nothing."""

    processed: bool = True  # --logprobs-mode processed_logprobs
    step: float = 0.0  # weights are rounded to multiples of it
    generation_config: dict[str, Any] = field(default_factory=dict)
    stops: tuple[int, ...] = ()  # end tokens of its own
    forced: dict[str, Any] = field(default_factory=dict)  # parameters that it applies whatever a request states
    returns_ids: bool = True
    dev_mode: bool = True
    reloads: bool = True
    drops: int = 0  # of the first completions the connection breaks
    forgets: bool = False  # with the first that fails, its weights are those that it was started with
    lost_in_load: int = 0  # the load (from 1) between whose weights and prefix cache it breaks, and forgets them
    busy: int = 0  # of the first completions are turned away
    first_waits_for: int = 0  # completions after which the first is answered
    held_until: int = 0  # no completion is answered before so many were in flight
    name: str | None = None  # of its model; None: any
    max_model_len: int = 2048


class VLLMServer:
    """`most` is the largest number of completions in flight; `asked` counts completions by seed, and `bodies` has all."""

    def __init__(self, model: PreTrainedModel, behaviour: Behaviour | None = None, *, end: int = 1) -> None:
        self.behaviour, self.end = behaviour or Behaviour(), end
        self.model, self.base = deepcopy(model), model.state_dict()
        self._set(self.base)
        self.loaded: list[str] = []
        self.asked: Counter[int] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.most = self._now = self._answered = 0
        self._was_lost_in_load = False
        self._enough, self._lock = threading.Condition(), threading.Lock()
        self._server = _Server(("127.0.0.1", 0), _handler(self))
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    # --- the API ---------------------------------------------------------------------------------------------------------

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]] | None:
        """Status and JSON; None breaks the connection."""
        if path == "/v1/models":
            return 200, {"object": "list", "data": [{"id": self.behaviour.name or "model", "object": "model"}]}
        if path in ("/collective_rpc", "/reset_prefix_cache"):
            return self._develop(path, body)
        if path != "/v1/completions":
            return MISSING, {"error": {"message": "Not Found"}}
        return self._completion(body)

    def _develop(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]] | None:
        if not self.behaviour.dev_mode:
            return MISSING, {"detail": "Not Found"}
        if path == "/collective_rpc":
            assert body["method"] == "reload_weights"
            directory = Path(body["kwargs"]["weights_path"])
            self.loaded.append(str(directory))
            if self.behaviour.reloads:
                with self._lock:
                    self._set(load_file(directory / "model.safetensors"))
        elif len(self.loaded) == self.behaviour.lost_in_load and not self._was_lost_in_load:
            self._was_lost_in_load = True
            with self._lock:
                self._set(self.base)
            return None
        return 200, {}

    def _set(self, weights: dict[str, Tensor]) -> None:
        step = self.behaviour.step
        rounded = {name: (value / step).round() * step if step else value for name, value in weights.items()}
        self.model.load_state_dict(rounded, strict=False)

    def _completion(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]] | None:
        how = self.behaviour
        with self._lock:
            number = sum(self.asked.values())
            self.asked[body["seed"]] += 1
            self.bodies.append(body)
            if how.forgets and number == 0:  # before a second one comes in
                self._set(self.base)
        with self._enough:
            self._now += 1
            self.most = max(self.most, self._now)
            self._enough.notify_all()
            self._enough.wait_for(lambda: self.most >= how.held_until, timeout=20)
        try:
            if number < how.drops:
                return None
            if number < how.busy:
                return BROKEN, {"error": {"message": "the engine is busy"}}
            with self._enough:
                self._enough.wait_for(lambda: number > 0 or self._answered >= how.first_waits_for, timeout=20)
            if how.name is not None and body["model"] != how.name:
                return MISSING, {"error": {"message": f"The model `{body['model']}` does not exist."}}
            if len(body["prompt"]) + body["max_tokens"] > how.max_model_len:
                return REFUSED, {"error": {"message": f"This model's maximum context length is {how.max_model_len} tokens."}}
            with self._lock:
                return 200, {"choices": [self._choice(body)]}
        finally:
            with self._enough:
                self._now, self._answered = self._now - 1, self._answered + 1
                self._enough.notify_all()

    @torch.no_grad()
    def _choice(self, body: dict[str, Any]) -> dict[str, Any]:
        how, prompt, ids, logps = self.behaviour, list(body["prompt"]), list[int](), list[float]()
        settings = {name: how.generation_config.get(name, value) if body.get(name) is None else body[name]
                    for name, value in DEFAULTS.items()} | how.forced  # fmt: skip
        generator, finish = np.random.default_rng(body["seed"]), "length"
        cache, new = None, prompt  # what the cache holds, and the tokens after it
        ends = {self.end, *how.stops, *(body.get("stop_token_ids") or ())}
        for _ in range(min(body["max_tokens"], how.generation_config.get("max_new_tokens", body["max_tokens"]))):
            read = self.model(torch.tensor([new]), past_key_values=cache, use_cache=True, logits_to_keep=1)
            logits, cache = read.logits[0, -1].float(), read.past_key_values
            processed = process(logits, prompt, ids, **settings)
            if settings["temperature"] == 0:
                token = int(processed.argmax())
            else:
                cumulative = processed.double().softmax(-1).cumsum(-1)
                token = int((cumulative < generator.random()).sum().clamp(max=len(logits) - 1))
            ids.append(token)
            new = [token]
            logps.append(float((processed if how.processed else logits).log_softmax(-1)[token]))
            if token in ends:
                finish = "stop"
                break
        choice = {"index": 0, "text": "", "finish_reason": finish, "stop_reason": None, "logprobs": {"token_logprobs": logps}}
        return {**choice, "token_ids": ids} if how.returns_ids and body.get("return_token_ids") else choice


@contextmanager
def servers_of(model: PreTrainedModel) -> Iterator[Callable[..., VLLMServer]]:
    """Yield `start(processed=False, ...)`: a server of that behaviour over a model, which runs until the context ends."""
    running: list[VLLMServer] = []

    def start(**behaviour: Any) -> VLLMServer:
        running.append(VLLMServer(model, Behaviour(**behaviour)))
        return running[-1]

    try:
        yield start
    finally:
        for each in running:
            each.close()


def process(
    logits: Tensor, prompt: list[int], ids: list[int], *, repetition_penalty: float, presence_penalty: float,
    frequency_penalty: float, temperature: float, top_p: float, top_k: int, min_p: float,
) -> Tensor:  # fmt: skip
    """vLLM's order: penalties (repetition over prompt and completion), temperature, min_p, top_k, top_p."""
    logits = logits.clone()
    seen = torch.tensor(sorted({*prompt, *ids}))
    logits[seen] = torch.where(logits[seen] > 0, logits[seen] / repetition_penalty, logits[seen] * repetition_penalty)
    for token, count in Counter(ids).items():
        logits[token] -= presence_penalty + frequency_penalty * count
    logits = logits / (temperature or 1.0)
    probabilities = logits.softmax(-1)
    logits[probabilities < min_p * probabilities.max()] = float("-inf")
    if top_k > 0:
        logits[logits < logits.topk(top_k).values[-1]] = float("-inf")
    if top_p < 1:
        order = logits.argsort(descending=True)
        before = logits.softmax(-1)[order].cumsum(-1) - logits.softmax(-1)[order]
        logits[order[before >= top_p]] = float("-inf")
    return logits


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 1024


def _handler(server: VLLMServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer({})

        def do_POST(self) -> None:
            self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def _answer(self, body: dict[str, Any]) -> None:
            if (answer := server.answer(self.path, body)) is None:
                self.close_connection = True
                self.connection.close()
                return
            data = json.dumps(answer[1]).encode()
            self.send_response(answer[0])
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None: ...

    return Handler
