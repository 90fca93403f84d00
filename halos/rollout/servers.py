"""Requests to OpenAI-compatible servers: the key comes from the environment, many run concurrently, each is paid for once."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Sequence
from typing import Any, TypeVar

import httpx

from halos.errors import UserError

Question = TypeVar("Question")
Answer = TypeVar("Answer")

KEY = "OPENAI_API_KEY"
CONNECT_TIMEOUT = 10.0  # seconds in which a running server responds
RETRIES = 6  # by the client, with exponential backoff: 429, 5xx, lost connections


class OverBudgetError(Exception):
    """A cap is reached; no more requests are sent."""


class _ClosingError(Exception):
    """A request was not sent, because an earlier one failed."""


def require_client(what: str) -> None:
    """Raises UserError where the package or the API key that `what` needs is missing."""
    try:
        import openai  # noqa: F401
    except ImportError as error:
        raise UserError(f"{what} needs the package openai: pip install openai") from error
    require_key(what)


def require_key(what: str) -> None:
    if not os.environ.get(KEY):
        raise UserError(
            f"{what} reads its key from the environment, and {KEY} is not set: export {KEY}=... (any value for a server that"
            " needs none)"
        )


def refuse_unreachable(url: str, key: str) -> None:
    """Raises UserError where nothing listens at a URL; any response will do, even an error."""
    try:
        httpx.get(f"{url.rstrip('/')}/models", timeout=CONNECT_TIMEOUT)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        reason = str(error) or type(error).__name__
        raise UserError(f"{key}={url} does not answer ({reason}): start the server first, or give its address") from error


def answers(
    questions: Sequence[Question],
    ask: Callable[[Any, Question], Coroutine[Any, Any, Answer]],
    *,
    url: str | None,
    concurrency: int,
    timeout: float,
) -> Generator[Answer, None, None]:
    """Yield results of `ask(client, question)` as they complete, `concurrency` at a time.

    Raises UserError for a server that does not answer, and OverBudgetError when `ask` does. Requests in flight at that moment,
    or when the generator is closed, may be paid for already: they are awaited, and `ask` stores their answers.
    """
    loop, results = asyncio.new_event_loop(), _results(questions, ask, url, concurrency, timeout)
    try:
        while True:
            try:
                yield loop.run_until_complete(anext(results))
            except StopAsyncIteration:
                return
    finally:
        loop.run_until_complete(results.aclose())
        loop.close()


async def _results(
    questions: Sequence[Question],
    ask: Callable[[Any, Question], Coroutine[Any, Any, Answer]],
    url: str | None,
    concurrency: int,
    timeout: float,
) -> AsyncGenerator[Answer, None]:
    import openai

    # the client reads the key from the environment; it is stored nowhere else
    async with openai.AsyncOpenAI(base_url=url, max_retries=RETRIES, timeout=timeout) as client:
        slots, closing = asyncio.Semaphore(concurrency), asyncio.Event()

        async def ask_one(question: Question) -> Answer:
            async with slots:
                if closing.is_set():
                    raise _ClosingError
                return await ask(client, question)

        tasks = [asyncio.ensure_future(ask_one(question)) for question in questions]
        try:
            for done in asyncio.as_completed(tasks):
                yield await done
        except openai.APIError as error:
            reason = f"{type(error).__name__}: {str(error).rstrip('.')}"
            raise UserError(
                f"{url or 'the API'} does not answer: {reason}. Answers so far are kept: the same command asks for the rest"
            ) from error
        finally:
            closing.set()
            await asyncio.gather(*tasks, return_exceptions=True)
