"""Many requests in flight: a failure ends the asking, and what was under way is neither lost nor waited for in vain."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from halos.errors import UserError
from halos.rollout.servers import concurrently, refuse_unreachable


@asynccontextmanager
async def client() -> AsyncIterator[str]:
    yield "client"


def test_answers_in_flight_when_one_fails_are_yielded_and_no_more_are_asked() -> None:
    asked = list[int]()

    async def ask(_: str, number: int) -> int:
        asked.append(number)
        await asyncio.sleep(0.01 if number == 1 else 0.1)
        if number == 1:
            raise UserError("the server is gone")
        return number

    answers = concurrently(range(10), ask, client=client(), limit=3, paid=True)
    assert {next(answers), next(answers)} == {0, 2}
    with pytest.raises(UserError, match="the server is gone"):
        next(answers)
    assert asked == [0, 1, 2]


@pytest.mark.parametrize("paid", [True, False])
def test_answers_in_flight_when_nobody_listens_any_more_are_awaited_where_they_are_paid_for(paid: bool) -> None:
    ended = list[int]()

    async def ask(_: str, number: int) -> int:
        await asyncio.sleep(0.05 * number)
        ended.append(number)
        return number

    answers = concurrently(range(3), ask, client=client(), limit=3, paid=paid)
    assert next(answers) == 0
    answers.close()
    assert ended == ([0, 1, 2] if paid else [0])


def test_a_server_that_nobody_runs_is_refused_at_once() -> None:
    with pytest.raises(UserError, match=r"online.sampler.url=http://127.0.0.1:9/v1 does not answer .*: start the server first"):
        refuse_unreachable("http://127.0.0.1:9/v1", "online.sampler.url")
