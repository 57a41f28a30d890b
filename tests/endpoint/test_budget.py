"""What decoded media of all requests may take: who waits, who is refused, and that nobody waits for ever."""

import asyncio

import pytest

from epd.endpoint.http.refusals import RefusedError
from epd.endpoint.media.budget import Budget, current_share


class Medium:
    """Something that was decoded; a film if it has frames."""

    def __init__(self, nbytes=0):
        if nbytes:
            self.media = (memoryview(bytes(nbytes)), {})


async def took(budget, share, *sizes):
    for i, size in enumerate(sizes):
        await budget.take(share, i, size)


async def test_requests_wait_until_there_is_room_and_come_in_turn():
    budget, done = Budget(100, 100), []

    async def request(name, size):
        with budget.share() as share:
            await budget.take(share, 1, size)
            done.append(name)
            await asyncio.sleep(0.01)
            assert budget.num_bytes <= 100

    await asyncio.gather(*(request(i, 60) for i in range(5)))
    assert done == [0, 1, 2, 3, 4] and budget.num_bytes == 0


async def test_two_requests_that_each_need_more_do_not_wait_for_each_other():
    budget = Budget(100, 100)

    async def request():
        with budget.share() as share:
            for i in range(4):
                await budget.take(share, i, 25)
                await asyncio.sleep(0.001)

    async with asyncio.timeout(2):
        await asyncio.gather(*(request() for _ in range(8)))
    assert budget.num_bytes == 0


async def test_what_is_given_back_is_free_at_once():
    budget = Budget(100, 100)
    with budget.share() as first, budget.share() as second:
        await took(budget, first, 50, 50)
        waiting = asyncio.create_task(budget.take(second, 0, 50))
        await asyncio.sleep(0.01)
        assert not waiting.done()
        assert budget.give_back(first, 1) == 50
        await waiting
        assert budget.give_back(first, 1) == 0
    assert budget.num_bytes == 0


async def test_a_request_with_more_than_one_may_have_is_refused():
    budget = Budget(1000, 100)
    with budget.share() as share:
        budget.ask(share, 60)
        with pytest.raises(RefusedError, match="120 bytes") as refused:
            budget.ask(share, 60)
    assert (refused.value.failure.status, refused.value.failure.code) == (400, "media_too_large")


async def test_a_request_that_waits_too_long_is_told_to_come_back():
    budget = Budget(100, 100, wait_s=0.02)
    with budget.share() as first, budget.share() as second:
        await took(budget, first, 100)
        with pytest.raises(RefusedError) as refused:
            await budget.take(second, 0, 1)
    assert refused.value.failure.status == 503 and refused.value.failure.retry_after_s > 0
    assert budget.num_bytes == 0


async def test_a_request_that_is_cancelled_while_it_waits_holds_up_nobody():
    budget = Budget(100, 100)

    async def request(size):
        with budget.share() as share:
            await budget.take(share, 0, size)

    with budget.share() as first:
        await took(budget, first, 100)
        second, third = (asyncio.create_task(request(50)) for _ in range(2))
        await asyncio.sleep(0.01)
        second.cancel()
        await asyncio.gather(second, return_exceptions=True)
    await asyncio.wait_for(third, 1)
    assert budget.num_bytes == 0


async def test_a_film_counts_with_what_was_decoded_of_it():
    budget = Budget(1000, 100)
    with budget.share() as share:
        ticket = object()
        budget.ask(share, 10)
        await budget.take(share, id(ticket), 10)
        film = budget.settle(share, ticket, Medium(50))
        assert budget.num_bytes == 50 and budget.give_back(share, id(film)) == 50
        await budget.take(share, id(ticket), 10)
        with pytest.raises(RefusedError):
            budget.settle(share, ticket, Medium(80))
    assert budget.num_bytes == 0


def test_outside_of_a_request_there_is_no_share():
    assert current_share.get() is None
