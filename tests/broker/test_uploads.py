"""Uploads: pictures encoded before they are asked about, and requests that bring no pixels."""

from __future__ import annotations

import pytest

from epd import messages as m
from epd.config import BrokerConfig
from epd.messages import Kind, Stage
from tests.broker.world import POOL_BYTES, SLOT_BYTES, World, decode_info, encode_info, prefill_info


@pytest.fixture
def world() -> World:
    world = World()
    world.pipeline()
    return world


def upload(world: World, upload_id: str, patches: list[str], ttl_s: float = 60.0, frames: int = 1) -> None:
    items = [m.Patch(patch_hash=h, modality="image", num_tokens=4, num_frames=frames) for h in patches]
    pixels = [f"pixels of {h}".encode() for h in patches] if frames else []
    world.say(world.endpoint, m.Upload(upload_id=upload_id, patches=items, ttl_s=ttl_s), pixels)


def submit_without_pixels(world: World, request_id: str, patches: list[str]) -> None:
    items = [m.Patch(patch_hash=h, modality="image", num_tokens=4) for h in patches]
    message = m.Submit(
        request_id=request_id, num_prompt_tokens=32, max_tokens=4, num_engine_frames=1, patches=items
    )  # fmt: skip
    world.say(world.endpoint, message, [b"engine"])


def started_anew(config: BrokerConfig | None = None) -> World:
    """A broker that has just started: only an endpoint has registered again."""
    world = World(config or BrokerConfig())
    world.endpoint = world.join("ep", Kind.ENDPOINT)
    return world


def cache_comes(world: World, pool_bytes: int = POOL_BYTES) -> None:
    pool = m.Pool(pool_id="pool", kind="shared_memory", name="pool", nbytes=pool_bytes, host="h")
    world.join("cache", Kind.CACHE, pools=[pool])


def test_an_upload_is_encoded_by_all_workers_and_announced_once_it_can_be_read(world: World) -> None:
    upload(world, "u", ["a", "b", "c"])
    jobs = world.take_jobs()
    assert {job.peer_id for job in jobs} == set(world.e)
    for job in jobs:
        assert world.take(m.Uploaded) == []
        world.say_encoded(job.peer_id, job.message)
    assert world.take(m.Uploaded, world.endpoint) == [m.Uploaded(upload_id="u")]
    assert world.core.counters().held_pins == 0
    assert world.core.counters().held_uploads == 1


def test_a_request_about_an_upload_brings_no_pixels_and_encodes_nothing(world: World) -> None:
    upload(world, "u", ["a", "b"])
    world.encode_all()
    submit_without_pixels(world, "r", ["a", "b"])
    assert world.take_jobs() == []
    [prefill] = world.take(m.Prefill)
    assert [one.patch_hash for one in prefill.ready] == ["a", "b"]


def test_a_request_that_comes_while_its_upload_is_being_encoded_waits_for_the_same_encode(world: World) -> None:
    upload(world, "u", ["a"])
    [job] = world.take_jobs()
    submit_without_pixels(world, "r", ["a"])
    world.say_encoded(job.peer_id, job.message)
    assert [one.leg_id for one in world.take(m.Ready)] == ["r"]
    assert len(world.take(m.Uploaded)) == 1


def test_an_upload_expires_and_its_memory_can_be_used_again() -> None:
    world = World()
    world.pipeline(pool_bytes=2 * SLOT_BYTES)
    upload(world, "u", ["a"], ttl_s=2.0)
    world.encode_all()
    world.submit("r1", ["b", "c"])
    assert world.take(m.Prefill) == [], "the upload is pinned"
    world.wait(2.5)
    assert [one.leg_id for one in world.take(m.Prefill)] == ["r1"]
    assert world.core.counters().held_uploads == 0


def test_an_upload_that_is_dropped_or_whose_endpoint_is_lost_pins_nothing(world: World) -> None:
    upload(world, "u1", ["a"])
    upload(world, "u2", ["b"])
    world.encode_all()
    world.say(world.endpoint, m.DropUpload(upload_id="u1"))
    assert world.core.counters().held_uploads == 1
    world.say(world.endpoint, m.Goodbye())
    assert world.core.counters().held_uploads == 0
    assert world.core.patches.index.stats().num_pins == 0


def test_uploads_may_pin_their_share_of_the_cache_only() -> None:
    world = World(BrokerConfig(upload_fraction=0.5))
    world.pipeline(pool_bytes=4 * SLOT_BYTES)
    upload(world, "u1", ["a", "b"])
    upload(world, "u2", ["c"])
    [refused] = world.take(m.Uploaded)
    assert (refused.upload_id, refused.code, refused.status) == ("u2", "overloaded", 503)


def test_an_upload_whose_patch_cannot_be_encoded_says_so(world: World) -> None:
    upload(world, "u", ["bad"])
    [job] = world.take_jobs()
    world.say(job.peer_id, m.EncodeFailed(job_id=job.message.job_id, message="no such pixels"))
    [refused] = world.take(m.Uploaded)
    assert (refused.code, refused.message) == ("encode_failed", "no such pixels")
    assert world.core.counters().held_uploads == 0


def test_an_upload_is_refused_under_an_id_that_is_taken(world: World) -> None:
    upload(world, "u", ["a"])
    upload(world, "u", ["b"])
    assert [one.code for one in world.take(m.Uploaded)] == ["duplicate_request"]


def test_an_upload_that_comes_to_a_new_broker_before_cache_and_workers_waits_for_them() -> None:
    world = started_anew()
    upload(world, "u", ["a"])
    cache_comes(world)
    world.wait(2.0)
    assert world.take(m.Uploaded) == world.take_jobs() == []
    worker = world.join("e0", Stage.ENCODE, encode_info())
    [(peer_id, job, frames)] = world.take_jobs()
    assert (peer_id, frames) == (worker, [b"pixels of a"])
    world.say_encoded(worker, job)
    assert world.take(m.Uploaded) == [m.Uploaded(upload_id="u")]
    assert world.core.ledger.held_bytes == 0, "the pixels are not held twice"


def test_an_upload_waits_for_the_last_encode_worker_to_come_back() -> None:
    world = World()
    world.pipeline(encode=1)
    world.say(world.e[0], m.Goodbye())
    upload(world, "u", ["a"])
    assert world.take(m.Uploaded) == []
    world.join("e0", Stage.ENCODE, encode_info())
    world.encode_all()
    assert world.take(m.Uploaded) == [m.Uploaded(upload_id="u")]


def test_a_request_about_an_upload_that_waits_brings_no_pixels_either() -> None:
    world = started_anew()
    upload(world, "u", ["a"])
    submit_without_pixels(world, "r", ["a"])
    cache_comes(world)
    world.join("p0", Stage.PREFILL, prefill_info("p0"))
    world.join("d0", Stage.DECODE, decode_info())
    world.join("e0", Stage.ENCODE, encode_info())
    assert [job.patch_hash for _, job in world.encode_all()] == ["a"]
    assert [one.leg_id for one in world.take(m.Ready)] == ["r"]
    assert world.take(m.Failed) == []


@pytest.mark.parametrize("grace_s", [0.0, 5.0])
def test_an_upload_is_refused_when_what_it_needs_has_been_away_for_too_long(grace_s: float) -> None:
    world = started_anew(BrokerConfig(absence_grace_s=grace_s))
    upload(world, "u", ["a"])
    world.wait(grace_s)
    [refused] = world.take(m.Uploaded)
    assert (refused.code, refused.message) == ("not_ready", "no encode worker and no cache is registered")
    world.assert_idle()
    cache_comes(world)
    upload(world, "v", ["a"])
    [refused] = world.take(m.Uploaded)
    assert (refused.upload_id, refused.message) == ("v", "no encode worker is registered")


@pytest.mark.parametrize("end", ["expired", "dropped", "endpoint lost"])
def test_an_upload_that_ends_while_it_waits_leaves_nothing(end: str) -> None:
    world = started_anew()
    cache_comes(world)
    upload(world, "u", ["a"], ttl_s=2.0)
    assert world.core.ledger.held_bytes > 0
    if end == "expired":
        world.wait(2.5)
    else:
        world.say(world.endpoint, m.DropUpload(upload_id="u") if end == "dropped" else m.Goodbye())
    world.assert_idle()
    world.join("e0", Stage.ENCODE, encode_info())
    assert world.take_jobs() == world.take(m.Uploaded) == []


def test_the_pixels_of_uploads_that_wait_are_bounded_with_those_of_requests() -> None:
    world = started_anew(BrokerConfig(max_frames_bytes=len(b"pixels of a") + 1))
    upload(world, "u", ["a"])
    upload(world, "v", ["b"])
    [refused] = world.take(m.Uploaded)
    assert (refused.upload_id, refused.code) == ("v", "overloaded")


def test_uploads_that_have_waited_may_still_pin_their_share_of_the_cache_only() -> None:
    world = started_anew()
    for upload_id in ("u", "v"):
        upload(world, upload_id, [upload_id])
    cache_comes(world, 2 * SLOT_BYTES)
    world.join("e0", Stage.ENCODE, encode_info())
    assert [(one.upload_id, one.code) for one in world.take(m.Uploaded)] == [("v", "overloaded")]
    assert [job.message.patch_hash for job in world.take_jobs()] == ["u"]


def test_a_request_without_pixels_for_a_patch_that_nobody_has_is_told_to_bring_them(world: World) -> None:
    submit_without_pixels(world, "r", ["a"])
    [failed] = world.take(m.Failed)
    assert failed.code == "pixels_needed"
    world.assert_idle()
    world.submit("r", ["a"])
    assert len(world.take_jobs()) == 1, "the same id may come again, with pixels"


def test_a_patch_that_was_evicted_is_encoded_again_from_pixels_that_are_still_kept() -> None:
    world = World()
    world.pipeline(pool_bytes=SLOT_BYTES)
    for request_id, patch in (("r1", "a"), ("r2", "b")):
        world.submit(request_id, [patch])
        world.encode_all()
        world.finish(request_id, world.p[0], world.d[0])
    submit_without_pixels(world, "r3", ["a"])
    [job] = world.take_jobs()
    assert job.frames == [b"pixels of a"]


def test_pixels_are_kept_within_their_bound() -> None:
    world = World(BrokerConfig(pixel_store_bytes=25))
    world.pipeline()
    world.submit("r1", ["a"])
    world.submit("r2", ["b"])
    world.submit("r3", ["c"])
    store = world.core.patches.pixels
    assert store.num_bytes <= 25
    assert not store.get("a", {})
    assert store.get("c", {}) == [b"pixels of c"]


def test_the_seconds_that_hits_save_are_counted(world: World) -> None:
    world.submit("r1", ["a"])
    [job] = world.take_jobs()
    one = m.EncodedJob(job_id=job.message.job_id, generation=job.message.slot.generation)
    world.say(job.peer_id, m.Encoded(jobs=[one], took_s=0.5))
    world.submit("r2", ["a"])
    assert world.core.counters().encode_s_saved == pytest.approx(0.5)
