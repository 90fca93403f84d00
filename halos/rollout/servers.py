"""Requests to OpenAI-compatible servers: the key comes from the environment, many are in flight, each is paid for once."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Generator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, TypeVar

import httpx

from halos.errors import UserError
from halos.redaction import redact

log = logging.getLogger(__name__)

Question = TypeVar("Question")
Answer = TypeVar("Answer")

KEY = "OPENAI_API_KEY"
CONNECT_TIMEOUT = 10.0  # seconds in which a running server responds
RETRIES = 6  # by OpenAI's client, with exponential backoff: 429, 5xx, lost connections
DELAYS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)  # seconds, before each further request to a server of the user's own
BUSY = (408, 425, 429)  # statuses after which the same request may succeed, besides 5xx
GATEWAY = (502, 503, 504)  # what a proxy answers while the server behind it starts again


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
    """Yield results of `ask(client, question)` of OpenAI's client as they complete, `concurrency` at a time.

    Raises UserError for a server that does not answer, and OverBudgetError when `ask` does. Requests in flight at that moment,
    or when the generator is closed, may be paid for already: they are awaited, and `ask` stores their answers.
    """
    import openai

    # the client reads the key from the environment; it is stored nowhere else
    pool: Any = openai.DefaultAsyncHttpxClient(limits=connections(concurrency))
    client = openai.AsyncOpenAI(base_url=url, max_retries=RETRIES, timeout=timeout, http_client=pool)
    try:
        yield from concurrently(questions, ask, client=client, limit=concurrency, paid=True)
    except openai.APIError as error:
        reason = f"{type(error).__name__}: {str(error).rstrip('.')}"
        raise UserError(
            f"{url or 'the API'} does not answer: {reason}. Answers so far are kept: the same command asks for the rest"
        ) from error


def connections(limit: int) -> Any:
    """As many connections as requests in flight, so that none waits for another's."""
    return httpx.Limits(max_connections=limit, max_keepalive_connections=limit)


def concurrently(
    questions: Sequence[Question],
    ask: Callable[[Any, Question], Coroutine[Any, Any, Answer]],
    *,
    client: AbstractAsyncContextManager[Any],
    limit: int,
    paid: bool,
) -> Generator[Answer, None, None]:
    """Yield results of `ask(client, question)` as they complete, `limit` at a time. After the first exception of `ask` no more
    are asked; the results of those in flight are yielded, then it is raised. Where the generator is closed, those in flight are
    awaited if they are `paid`, so that `ask` can store them, else cancelled."""
    loop, results = asyncio.new_event_loop(), _results(questions, ask, client, limit, paid)
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
    client: AbstractAsyncContextManager[Any],
    limit: int,
    paid: bool,
) -> AsyncGenerator[Answer, None]:
    async with client as opened:
        slots, closing = asyncio.Semaphore(limit), asyncio.Event()

        async def ask_one(question: Question) -> Answer:
            async with slots:
                if closing.is_set():
                    raise _ClosingError
                try:
                    return await ask(opened, question)
                except Exception:
                    closing.set()  # before the slot is free
                    raise

        tasks = [asyncio.ensure_future(ask_one(question)) for question in questions]
        failure: Exception | None = None
        try:
            for done in asyncio.as_completed(tasks):
                try:
                    result = await done
                except Exception as error:
                    failure = failure or error
                else:
                    yield result
            if failure is not None:
                raise failure
        finally:
            closing.set()
            for task in tasks if not paid else ():
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def post(
    client: httpx.AsyncClient, url: str, body: dict[str, Any], *, remedies: Mapping[int, str], lost: Callable[[], None],
    ready: Callable[[], Awaitable[None]] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The JSON that a server of the user's own answers. Asks again where it does not answer or is overloaded, for about two
    minutes, in which a server that is restarted loads its model. `lost` is called where the server may have been, and `ready` is
    awaited before it is asked. Raises UserError, at once for a status in `remedies`, which then says what to do."""
    for delay in (*DELAYS, None):
        if ready is not None:
            await ready()
        try:
            response = await client.post(url, json=body)
            response.raise_for_status()
            return response.json() if response.content else {}
        except httpx.HTTPStatusError as error:
            status = error.response.status_code
            problem = f"answers {status}: {redact(error.response.text)[:300]}"
            if status in GATEWAY:
                lost()
            if delay is None or status in remedies or (status < 500 and status not in BUSY):
                raise UserError("; ".join([f"{url} {problem}", *filter(None, [remedies.get(status)])])) from error
        except httpx.TransportError as error:
            lost()
            problem = f"does not answer: {type(error).__name__}: {error}"
            if delay is None or isinstance(error, httpx.ReadTimeout | httpx.UnsupportedProtocol):
                raise UserError(f"{url} {problem}") from error
        except (httpx.InvalidURL, ValueError) as error:
            raise UserError(f"{url} does not answer: {type(error).__name__}: {error}") from error
        if delay == DELAYS[0]:
            log.warning("%s %s; asking again for up to %d seconds", url, problem, sum(DELAYS))
        await asyncio.sleep(delay)
    raise AssertionError("the last delay is None")
