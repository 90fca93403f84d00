"""The engine vllm: processes with their own interpreter, since its pinned versions conflict with ours, or a server."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from halos.config.schema import Sampler
from halos.rollout.engines._token_engine import TokenEngine
from halos.rollout.engines._vllm_processes import SubprocessEngine
from halos.rollout.engines._vllm_server import ServerEngine
from halos.rollout.engines.engine import Engine, PolicyServer
from halos.rollout.servers import refuse_unreachable
from halos.rollout.types import Origin


class VLLM(TokenEngine):
    """Opens either; the API is that of vLLM 0.10.2 and later."""

    takes = ("top_k", "python", "url", "model", "concurrency", "tensor_parallel", "replicas")
    addresses = ("python", "url")

    @classmethod
    def problem(cls, settings: Sampler, spelled: Callable[[str], str]) -> str | None:
        if settings.url is not None:
            idle = [name for name in ("tensor_parallel", "replicas") if getattr(settings, name) > 1]
            server = f"{spelled('url')} names a server, which has its own processes (vllm serve --tensor-parallel-size,"
            return f"{spelled(idle[0])} has no effect: {server} --data-parallel-size)" if idle else None
        if settings.python is not None:
            return None
        return (
            f"{spelled('python')} is missing: an interpreter that has vllm (python -m venv .vllm && .vllm/bin/pip install -r"
            f" launch/requirements-vllm.txt gives .vllm/bin/python); or give {spelled('url')} of a running server"
        )

    @classmethod
    def check_ready(cls, settings: Sampler) -> None:
        if settings.url is not None:
            refuse_unreachable(settings.url, "online.sampler.url")

    @classmethod
    def open(
        cls, settings: Sampler, origin: Origin, *, directory: Path | None, tokenizer: Any, model: Callable[[], Any], dtype: str
    ) -> Engine:
        engine = ServerEngine if settings.url else SubprocessEngine
        return engine.open(settings, origin, directory=directory, tokenizer=tokenizer, model=model, dtype=dtype)

    @classmethod
    def open_server(cls, settings: Sampler, origin: Origin, *, tokenizer: Any, model: str) -> PolicyServer | None:
        if settings.url is None:
            return super().open_server(settings, origin, tokenizer=tokenizer, model=model)
        cls.check_ready(settings)
        return ServerEngine(tokenizer, settings, origin, stops=(), model=model)


ENGINE = VLLM
