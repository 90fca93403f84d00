"""vLLM in processes of its own: one for each replica, which get requests as they are done with others."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halos.config.schema import Sampler
from halos.distributed.children import die_with_parent, environment_without_launcher
from halos.distributed.environment import world_size
from halos.errors import UserError
from halos.rollout.engines._token_engine import TokenEngine, stops_of
from halos.rollout.types import Origin, Request, Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WORKER = Path(__file__).with_name("_vllm_worker.py")
PATIENCE = 30.0  # seconds in which a process may end
DEVICES = "CUDA_VISIBLE_DEVICES"

Lines = queue.SimpleQueue[tuple["Worker", str | None]]


class Worker:
    """A process that runs _vllm_worker.py. The lines that it writes are put into a queue, and None when it has ended."""

    def __init__(self, python: str, arguments: Sequence[str], devices: str | None, lines: Lines) -> None:
        chosen = {DEVICES: devices} if devices is not None else {}
        try:
            self.process = subprocess.Popen(
                [python, str(WORKER), *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                env=environment_without_launcher(**chosen), preexec_fn=die_with_parent,
            )  # fmt: skip
        except OSError as error:
            raise UserError(f"online.sampler.python={python} cannot be started: {error}") from error
        self.waiting: set[int] = set()  # numbers of the requests that it has not answered
        threading.Thread(target=self._read, args=(lines,), daemon=True).start()

    def _read(self, lines: Lines) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith('{"number"'):  # vLLM also prints other lines
                lines.put((self, line))
        lines.put((self, None))

    def send(self, number: int, request: Mapping[str, Any]) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"number": number, **request}) + "\n")
        self.process.stdin.flush()
        self.waiting.add(number)

    def close(self) -> None:
        assert self.process.stdin is not None
        if not self.waiting:
            self.process.stdin.close()
        else:
            self.process.kill()
        try:
            self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class SubprocessEngine(TokenEngine):
    """Starts the replicas with settings under which their log-probs are those of the policy: its own dtype, after temperature,
    and without the defaults of its generation_config."""

    def __init__(
        self, model: str, tokenizer: PreTrainedTokenizerBase, settings: Sampler, origin: Origin, *, stops: Sequence[int],
        dtype: str,
    ) -> None:  # fmt: skip
        super().__init__(tokenizer, settings, origin, stops=stops)
        if world_size() > 1:
            raise UserError(
                "one process starts vLLM, on all GPUs: leave out accelerate launch, and give online.sampler.replicas and"
                " online.sampler.tensor_parallel"
            )
        assert settings.python is not None
        self.python, self._numbers, self._lines = settings.python, count(), Lines()
        chosen = {"dtype": dtype, "logprobs_mode": "processed_logprobs", "generation_config": "vllm", "seed": 0,
                  "tensor_parallel_size": settings.tensor_parallel}  # fmt: skip
        self._workers = [Worker(self.python, [model, json.dumps(chosen)], devices, self._lines)
                         for devices in devices_of(settings.replicas, settings.tensor_parallel)]  # fmt: skip

    @classmethod
    def open(
        cls, settings: Sampler, origin: Origin, *, directory: Path | None, tokenizer: Any, model: Callable[[], Any], dtype: str
    ) -> SubprocessEngine:
        assert directory is not None
        stops = stops_of(directory, tokenizer)
        return cls(str(directory), tokenizer, settings, origin, stops=stops, dtype=dtype)

    def sample(self, requests: Sequence[Request]) -> Iterator[Sample]:
        asked, left, worker = dict[int, Request](), deque(requests), self._workers[0]
        try:
            for _ in range(self.in_flight):  # in turn, so that each has its share of a short list
                for worker in self._workers:
                    self._send(worker, left, asked)
            while asked:
                worker, line = self._lines.get()
                if line is None:
                    raise OSError("the pipe is closed")
                answer = json.loads(line)
                worker.waiting.discard(answer["number"])
                if (request := asked.pop(answer["number"], None)) is not None:  # None: of an earlier list, which was given up
                    self._send(worker, left, asked)
                    yield self._sample(request, answer["ids"], answer["logps"], answer["finish"])
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                f"vLLM (in {self.python}) ended before it had answered: {_state(worker)}; its output is above. Answers so far"
                " are kept: the same command resumes"
            ) from error

    def _send(self, worker: Worker, left: deque[Request], asked: dict[int, Request]) -> None:
        if left:
            number, request = next(self._numbers), left.popleft()
            asked[number] = request
            worker.send(number, {"prompt_token_ids": list(request.ids), "parameters": self._parameters(request)})

    def close(self) -> None:
        for worker in self._workers:
            worker.close()


def _state(worker: Worker) -> str:
    try:
        return f"exit status {worker.process.wait(10)}"
    except subprocess.TimeoutExpired:
        return "it is still running"


def devices_of(replicas: int, each: int) -> list[str | None]:
    """The GPUs of each replica, as CUDA_VISIBLE_DEVICES takes them; None, all, for a single one, which takes the first itself.
    Raises UserError where there are not enough."""
    if replicas == 1:
        return [None]
    names = os.environ.get(DEVICES)
    gpus = [name for name in names.split(",") if name] if names is not None else _gpus()
    if len(gpus) < replicas * each:
        raise UserError(
            f"online.sampler.replicas={replicas} of online.sampler.tensor_parallel={each} GPUs each need {replicas * each} GPUs,"
            f" and there are {len(gpus)}"
        )
    return [",".join(gpus[number * each : (number + 1) * each]) for number in range(replicas)]


def _gpus() -> list[str]:
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]
