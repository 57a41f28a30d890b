"""Pictures are cut by what all encode workers have proved, and cut again when that changes."""

import json

import msgspec
import pytest
import pytest_asyncio

from epd.messages import Stage, WorkerInfo

from .fake_broker import ALL_STAGES, says, status_of
from .serving import serving, until, with_picture

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(tmp_path_factory):
    async with serving(tmp_path_factory.mktemp("endpoint"), script=says([100])) as served:
        yield served


async def proved(served, *units):
    """Has one encode worker for each of `units` be there, and waits until the endpoint knows."""
    status = status_of([*ALL_STAGES, *[Stage.ENCODE] * (len(units) - 1)])
    found = iter(units)
    workers = [
        msgspec.structs.replace(worker, info=WorkerInfo(units=next(found), tokens_per_patch={"image": 4}))
        if worker.stage is Stage.ENCODE
        else worker
        for worker in status.workers
    ]
    served.broker.status = msgspec.structs.replace(status, workers=workers)
    await served.broker.send(served.broker.status)

    async def known():
        members = json.loads((await served.get("/ready"))[1])["members"]
        return [one["units"] for one in members if one["stage"] == "encode"] == list(units)

    await until(known)


async def asked(served):
    """The embeddings of each patch that a question about the demo picture is sent with."""
    await served.chat(content=with_picture())
    return [patch.num_tokens for patch in served.broker.submits[-1].patches]


async def test_a_picture_is_cut_by_the_unit_that_all_encode_workers_have_proved(served):
    assert await asked(served) == [4] * 9
    await proved(served, {"image": "tile"}, {"image": "item"})
    assert await asked(served) == [36], "a cut of another unit is not used again"
    await proved(served, {"image": "tile"}, {"image": "tile"})
    assert await asked(served) == [4] * 9
    await proved(served, {})
    assert await asked(served) == [36]


async def test_models_says_what_pictures_are_cut_into(served):
    await proved(served, {"image": "tile"}, {"image": "item"})
    (card,) = json.loads((await served.get("/v1/models"))[1])["data"]
    assert card["epd"] == {"units": {"image": "item"}, "tokens_per_patch": {}}
    assert card["object"] == "model", "and all that vLLM says"
