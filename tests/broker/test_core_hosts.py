"""Several hosts: who can reach which pool decides who encodes and who prefills."""

from __future__ import annotations

from epd import messages as m
from epd.messages import Kind, Stage
from tests.broker.world import POOL_BYTES, World, decode_info, encode_info, prefill_info


def two_hosts(address: str = "") -> World:
    """Hosts a and b with a cache, an encode and a prefill worker each; one decode worker."""
    world = World()
    world.endpoint = world.join("ep", Kind.ENDPOINT)
    for host in "ab":
        pool = m.Pool(pool_id=f"pool-{host}", kind="k", name=host, nbytes=POOL_BYTES, host=host, address=address)
        world.join(f"cache-{host}", Kind.CACHE, pools=[pool], host=host)
        world.join(f"e-{host}", Stage.ENCODE, encode_info(), host=host)
        world.join(f"p-{host}", Stage.PREFILL, prefill_info(f"p-{host}"), host=host)
    world.join("d", Stage.DECODE, decode_info(), host="a")
    world.sent.clear()
    return world


def run(world: World, request_id: str, patches: list[str]) -> tuple[str, list[str]]:
    """Submits a request; returns its prefill worker, and the pools and workers of what was encoded."""
    world.submit(request_id, patches)
    request = world.core.requests[request_id]
    encoded = []
    for worker, job in world.encode_all():
        encoded.append(f"{job.slot.pool_id} by {world.names[worker]}")
    return world.names[request.leg.prefill.peer_id], sorted(encoded)


def test_patches_are_encoded_where_they_are_wanted() -> None:
    world = two_hosts()
    assert run(world, "r1", ["a", "b"]) == ("p-a", ["pool-a by e-a"] * 2)
    assert run(world, "r2", ["c", "d"]) == ("p-b", ["pool-b by e-b"] * 2)


def test_a_request_goes_where_its_patches_can_be_read() -> None:
    world = two_hosts()
    assert run(world, "r1", ["a"])[0] == "p-a"
    assert run(world, "r2", ["a"]) == ("p-a", []), "the other one has less to do, but cannot read it"


def test_pools_that_are_served_are_used_by_all() -> None:
    world = two_hosts(address="tcp://far:1")
    assert run(world, "r1", ["a", "b", "c", "d"]) == ("p-a", ["pool-a by e-a"] * 2 + ["pool-a by e-b"] * 2)
    assert run(world, "r2", ["a"]) == ("p-b", [])


def test_a_host_whose_encode_workers_are_busy_holds_up_no_other_host() -> None:
    world = two_hosts()
    many = [f"a{number}" for number in range(100)]
    world.submit("r1", many)
    assert {world.names[send.peer_id] for send in world.take_jobs()} == {"e-a"}
    assert len(world.core.patches.queue) == 100, "more than it is given ahead"
    world.submit("r2", ["b0", "b1"])
    jobs = world.take_jobs()
    assert [world.names[send.peer_id] for send in jobs] == ["e-b"] * 2
    for send in jobs:
        world.say_encoded(send.peer_id, send.message)
    assert not world.take_jobs(), "the other host's worker cannot do what waits"


def test_a_patch_that_waits_for_a_host_is_not_passed_by_those_that_its_workers_could_do() -> None:
    world = two_hosts()
    world.submit("r1", ["a0", "a1", "a2"], tokens=60)
    given = world.take_jobs()
    assert len(given) == 2, "128 tokens ahead"
    prefill = world.core.requests["r1"].leg.prefill.peer_id
    world.submit("r2", ["b"])
    world.submit("r3", ["small"], tokens=1)  # to host a again
    assert world.core.requests["r3"].leg.prefill.peer_id == prefill
    assert [world.names[send.peer_id] for send in world.take_jobs()] == ["e-b"]
    world.say_encoded(given[0].peer_id, given[0].message)
    assert [send.message.patch_hash for send in world.take_jobs()] == ["a2", "small"]


def unstored(world: World) -> str:
    """The worker of the only job says that the pool's host has not answered; returns its name."""
    [send] = world.take_jobs()
    told = m.EncodeFailed(job_id=send.message.job_id, message="no answer", unstored=True)
    world.say(send.peer_id, told)
    return world.names[send.peer_id]


def test_a_patch_that_could_not_be_stored_from_afar_is_encoded_near_its_pool() -> None:
    world = two_hosts(address="tcp://far:1")
    near = next(peer for peer in world.core.registry.serving(Stage.ENCODE) if peer.name == "e-a")
    near.embeddings_to_encode += 50
    world.core.stages.update(near)
    world.submit("r", ["a"])
    assert unstored(world) == "e-b"
    [(worker, job)] = world.encode_all()
    assert world.names[worker] == "e-a"
    assert [one.patch_hash for one in world.take(m.Ready)[-1].ready] == [job.patch_hash]


def test_a_patch_that_can_never_be_stored_ends_its_request() -> None:
    world = two_hosts()
    world.submit("r", ["a"])
    assert [unstored(world) for _ in range(6)] == ["e-a"] * 6
    assert "r" in world.core.requests, "a host that is silent for a moment costs no request"
    world.wait(2 * world.core.config.lost_after_s + 0.5)
    unstored(world)
    [failed] = world.take(m.Failed)
    assert failed.code == "encode_failed"
    assert "could not be stored, 7 times: no answer" in failed.message


def test_a_patch_that_is_never_found_where_it_is_wanted_ends_its_request() -> None:
    world = two_hosts()
    world.submit("r", ["a"])
    prefill = world.core.requests["r"].leg.prefill.peer_id

    def not_found() -> None:
        [(_, job)] = world.encode_all()
        world.say(prefill, m.Stale(leg_id="r", patch_hash="a", generation=job.slot.generation, reason="no way"))

    for _ in range(6):
        not_found()
    assert "r" in world.core.requests, "a host that is silent for a moment costs no request"
    world.wait(2 * world.core.config.lost_after_s + 0.5)
    not_found()
    [failed] = world.take(m.Failed)
    assert failed.code == "encode_failed"
    assert "7 times: no way" in failed.message


def test_patches_that_wait_for_a_worker_that_drains_go_where_they_can_be_told_why_not() -> None:
    """The last worker of their host leaves: nobody reaches their pool, and somebody has to say so."""
    world = two_hosts()
    world.submit("r1", ["a0", "a1", "a2"], tokens=60)
    given = world.take_jobs()
    assert {world.names[send.peer_id] for send in given} == {"e-a"} and len(given) == 2
    world.say(given[0].peer_id, m.Draining())
    assert [(world.names[send.peer_id], send.message.patch_hash) for send in world.take_jobs()] == [("e-b", "a2")]
