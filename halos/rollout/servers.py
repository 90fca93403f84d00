"""What servers behind an OpenAI-compatible URL are asked: with a key from the environment, many at a time, and paid for once."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Sequence
from typing import Any, TypeVar

import httpx

from halos.errors import UserError

Asked = TypeVar("Asked")
Given = TypeVar("Given")

KEY = "OPENAI_API_KEY"
LISTENS = 10.0  # seconds in which a server that is up says something
RETRIES = 6  # by the client, with its own growing pauses: 429, 5xx, lost connections


class OverBudgetError(Exception):
    """A cap is reached; nothing more is asked."""


class _EndingError(Exception):
    """Of what was not asked any more, because something before it went wrong."""


def refuse_without(what: str) -> None:
    """Raises UserError where the package or the key is missing that `what` needs."""
    try:
        import openai  # noqa: F401
    except ImportError as error:
        raise UserError(f"{what} needs the package openai: pip install openai") from error
    refuse_keyless(what)


def refuse_keyless(what: str) -> None:
    if not os.environ.get(KEY):
        raise UserError(
            f"{what} reads its key from the environment, and {KEY} is not set: export {KEY}=... (any word for a server that"
            " wants none)"
        )


def refuse_silent(url: str, key: str) -> None:
    """Raises UserError where nothing listens at an address; whatever it answers, be it an error, will do."""
    try:
        httpx.get(f"{url.rstrip('/')}/models", timeout=LISTENS)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        said = str(error) or type(error).__name__
        raise UserError(f"{key}={url} does not answer ({said}): start the server first, or give its address") from error


def answers(
    asked: Sequence[Asked],
    ask: Callable[[Any, Asked], Coroutine[Any, Any, Given]],
    *,
    url: str | None,
    concurrency: int,
    timeout: float,
) -> Generator[Given, None, None]:
    """What `ask(client, each)` gives, as it comes, so many at a time.

    Raises UserError for a server that does not answer, and OverBudgetError as `ask` does. What is under way then, or when
    nobody takes the answers any more, may be paid for already: it is awaited, and `ask` keeps it.
    """
    loop, coming = asyncio.new_event_loop(), _coming(asked, ask, url, concurrency, timeout)
    try:
        while True:
            try:
                yield loop.run_until_complete(anext(coming))
            except StopAsyncIteration:
                return
    finally:
        loop.run_until_complete(coming.aclose())
        loop.close()


async def _coming(
    asked: Sequence[Asked],
    ask: Callable[[Any, Asked], Coroutine[Any, Any, Given]],
    url: str | None,
    concurrency: int,
    timeout: float,
) -> AsyncGenerator[Given, None]:
    import openai

    # the key goes from the environment into the client, and nowhere else
    async with openai.AsyncOpenAI(base_url=url, max_retries=RETRIES, timeout=timeout) as client:
        gate, ending = asyncio.Semaphore(concurrency), asyncio.Event()

        async def one(each: Asked) -> Given:
            async with gate:
                if ending.is_set():
                    raise _EndingError
                return await ask(client, each)

        tasks = [asyncio.ensure_future(one(each)) for each in asked]
        try:
            for done in asyncio.as_completed(tasks):
                yield await done
        except openai.APIError as error:
            said = f"{type(error).__name__}: {str(error).rstrip('.')}"
            raise UserError(
                f"{url or 'the API'} does not answer: {said}. What was answered is kept: the same command asks for the rest"
            ) from error
        finally:
            ending.set()
            await asyncio.gather(*tasks, return_exceptions=True)
