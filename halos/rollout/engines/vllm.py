"""The engine vllm: a subprocess with its own interpreter, since its pinned versions conflict with ours, or a server."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from halos.config.schema import Sampler
from halos.distributed.children import die_with_parent, environment_without_launcher
from halos.errors import UserError
from halos.redaction import redact
from halos.rollout.engines.engine import Engine, PolicyServer
from halos.rollout.servers import KEY, refuse_unreachable
from halos.rollout.types import Origin, Request, Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WORKER = Path(__file__).with_name("_vllm_worker.py")
TIMEOUT = 600.0  # seconds for one completion


class VLLM(Engine):
    """Base of both ways to run vLLM: token ids in, token ids and their log-probs out."""

    takes = ("top_k", "python", "url", "model", "concurrency")
    addresses = ("python", "url")

    @classmethod
    def problem(cls, settings: Sampler, spelled: Callable[[str], str]) -> str | None:
        if settings.url is not None or settings.python is not None:
            return None
        return (
            f"{spelled('python')} is missing: an interpreter that has vllm (python -m venv .vllm && .vllm/bin/pip install -r"
            f" launch/requirements-vllm.txt gives .vllm/bin/python); or give {spelled('url')} of a running server"
        )

    @classmethod
    def open(
        cls, settings: Sampler, origin: Origin, *, directory: Path | None, tokenizer: Any, model: Callable[[], Any]
    ) -> Engine:
        if settings.url:
            return ServerEngine(tokenizer, settings, origin)
        return SubprocessEngine(str(directory), tokenizer, settings, origin)

    @classmethod
    def open_server(cls, settings: Sampler, origin: Origin, *, tokenizer: Any, model: str) -> PolicyServer | None:
        if settings.url is None:
            return super().open_server(settings, origin, tokenizer=tokenizer, model=model)
        refuse_unreachable(settings.url, "online.sampler.url")
        return ServerEngine(tokenizer, settings, origin, model=model)

    def __init__(self, tokenizer: PreTrainedTokenizerBase, settings: Sampler, origin: Origin) -> None:
        self.tokenizer, self.settings, self.origin = tokenizer, settings, origin

    def _parameters(self, request: Request) -> dict[str, Any]:
        top_p, top_k = self.settings.top_p, self.settings.top_k or -1
        return {"prompt_token_ids": list(request.ids), "seed": request.seed % 2**31, "temperature": request.temperature,
                "max_tokens": request.max_new_tokens, "top_p": top_p, "top_k": top_k}  # fmt: skip

    def _sample(self, request: Request, ids: Sequence[int], logps: Sequence[float], finish: str) -> Sample:
        stopped = bool(ids) and finish == "stop" and ids[-1] == self.tokenizer.eos_token_id
        text = self.tokenizer.decode(list(ids[:-1] if stopped else ids), skip_special_tokens=True)
        assert isinstance(text, str)
        finish = "stop" if finish == "stop" else "length"
        return Sample.of(request, self.origin, text, finish=finish, tokens=len(ids), ids=ids, logps=logps)


class SubprocessEngine(VLLM):
    """One vLLM process for all requests: lines of JSON in, lines of JSON out."""

    def __init__(self, model: str, tokenizer: PreTrainedTokenizerBase, settings: Sampler, origin: Origin) -> None:
        super().__init__(tokenizer, settings, origin)
        assert settings.python is not None
        self.python = settings.python
        try:
            self._process = subprocess.Popen(
                [self.python, str(WORKER), model], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                env=environment_without_launcher(), preexec_fn=die_with_parent,
            )  # fmt: skip
        except OSError as error:
            raise UserError(f"online.sampler.python={self.python} cannot be started: {error}") from error

    def sample(self, requests: Sequence[Request]) -> Iterator[Sample]:
        pipe_in, pipe_out = self._process.stdin, self._process.stdout
        assert pipe_in is not None
        assert pipe_out is not None
        try:
            pipe_in.write(json.dumps([self._parameters(each) for each in requests]) + "\n")
            pipe_in.flush()
            for _ in requests:
                answer = json.loads(_answer(pipe_out))
                yield self._sample(requests[answer["number"]], answer["ids"], answer["logps"], answer["finish"])
        except (OSError, ValueError, KeyError) as error:
            status = self._process.wait(10) if self._process.poll() is not None else "still running"
            raise UserError(
                f"vLLM (in {self.python}) ended before it had answered: exit status {status}; its output is above. Answers so far"
                " are kept: the same command resumes"
            ) from error


def _answer(pipe: Any) -> str:
    """The next line that is an answer; vLLM also prints other lines."""
    for text in pipe:
        if text.startswith('{"number"'):
            return text
    raise OSError("the pipe is closed")


class ServerEngine(VLLM, PolicyServer):
    """A running `vllm serve`, whose completions API takes token ids and returns token ids with log-probs."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, settings: Sampler, origin: Origin, *, model: str | None = None
    ) -> None:
        """`model` is the model's name on the server, unless `settings.model` gives it; by default the generator's name."""
        super().__init__(tokenizer, settings, origin)
        assert settings.url is not None
        self.url, self.model = settings.url.rstrip("/"), settings.model or model or origin.generator
        key = os.environ.get(KEY)
        self._client = httpx.Client(timeout=TIMEOUT, headers={"Authorization": f"Bearer {key}"} if key else {},
                                    transport=httpx.HTTPTransport(retries=3))  # fmt: skip

    def sample(self, requests: Sequence[Request]) -> Iterator[Sample]:
        with ThreadPoolExecutor(self.settings.concurrency) as threads:
            yield from threads.map(self._ask, requests)

    def _ask(self, request: Request) -> Sample:
        parameters = self._parameters(request)
        body = {"model": self.model, "prompt": parameters.pop("prompt_token_ids"), "logprobs": 0, "return_token_ids": True}
        choice = self._post(f"{self.url}/completions", {**body, **parameters})["choices"][0]
        if not choice.get("token_ids"):
            raise UserError(f"{self.url} returns no token_ids: --sampler vllm needs a vLLM server from 0.10.2 on")
        logps = choice["logprobs"]["token_logprobs"]
        return self._sample(request, choice["token_ids"], logps, choice["finish_reason"])

    def load(self, weights: Path) -> None:
        """Make the server reload its weights from a directory that it can reach, and drop its prefix cache.

        The server offers this only with VLLM_SERVER_DEV_MODE=1. Raises UserError otherwise.
        """
        root = self.url.removesuffix("/v1")
        self._post(f"{root}/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(weights)}})
        self._post(f"{root}/reset_prefix_cache", {})

    def _post(self, url: str, body: dict[str, Any]) -> dict[str, Any]:
        try:
            answer = self._client.post(url, json=body)
            answer.raise_for_status()
            return answer.json() if answer.content else {}
        except httpx.HTTPStatusError as error:
            hint = "; start it with VLLM_SERVER_DEV_MODE=1" if error.response.status_code == 404 else ""
            raise UserError(f"{url} answers {error.response.status_code}: {redact(error.response.text)[:300]}{hint}") from error
        except (httpx.HTTPError, ValueError) as error:
            raise UserError(f"{url} does not answer: {type(error).__name__}: {error}") from error


ENGINE = VLLM
