"""The table of faults: for each edge and fault the outcome, in words and as what may become of a request.

`ends` are the ends that requests may have in the cluster (`tests/faults/cluster.py`); at least one request has each of
them, and none has any other. `tests` names tests with real processes that show the same, or more; where a cell has no
`ends`, they alone show it.
"""

from __future__ import annotations

import dataclasses

FAULTS = ("killed", "hung", "slow", "lost", "duplicated", "reordered", "stale", "corrupted")

KILLED = "tests/pipeline/test_killed_in_the_middle.py::test_killed_at_any_moment_every_answer_is_right"
DEAD = "tests/pipeline/test_dead_workers.py::"
LEAKS = "tests/workers/test_kv_leaks.py::"
LINK = "tests/wire/test_link.py::"
SLOTS = "tests/pipeline/test_slots.py::test_forged_slots_are_refused_and_encoded_again"
RESTART = "tests/pipeline/test_broker_restart.py::"
BROKER_LOST = "tests/endpoint/test_broker_lost.py::"
COMING = "tests/pipeline/test_coming_and_going.py::"
SLOW_CLIENTS = "tests/endpoint/test_slow_clients.py::"
FINE, DEADLINE = "finished", "deadline_exceeded"


@dataclasses.dataclass(frozen=True)
class Cell:
    """One cell of the table."""

    edge: str
    fault: str
    outcome: str
    ends: tuple[str, ...] = ()
    tests: tuple[str, ...] = ()


_SLOW = "right, later"
_LOST = "ends at its deadline; the others are right"
_STUCK = "right, later; a worker that holds something and makes no step is replaced after `hung_after_s`"
_REFUSED = "refused as not a message and counted; then as lost"
_TWICE = "right; the second changes nothing"
_EARLIER = "right; nobody receives it, or it is fenced"
_AGAIN = "right; what the slot holds is refused, and the patch encoded again"

CELLS: tuple[Cell, ...] = (
    Cell(
        "endpoint–broker", "killed", "right; the next broker gets what the endpoint holds, with its tokens",
        (FINE,), (RESTART + "test_streams_go_on_with_the_next_broker",),
    ),
    Cell(
        "endpoint–broker", "hung", "right, later; submitted again after 3.5 s. An answer that has begun and cannot be "
        "continued exactly: `broker_lost`", (FINE, "broker_lost"),
        (BROKER_LOST + "test_a_request_that_cannot_go_on_fails_at_once_and_says_so",),
    ),
    Cell("endpoint–broker", "slow", _SLOW, (FINE,)),
    Cell("endpoint–broker", "lost", _LOST, (FINE, DEADLINE)),
    Cell(
        "endpoint–broker", "duplicated", _TWICE, (FINE,),
    ),
    Cell("endpoint–broker", "reordered", "right", (FINE,)),
    Cell("endpoint–broker", "stale", _EARLIER, (FINE,), (LINK + "test_",)),
    Cell("endpoint–broker", "corrupted", _REFUSED, (FINE, DEADLINE), ("tests/wire/test_wire.py::test_",)),
    Cell(
        "broker–encode", "killed", "right; only its unfinished patches go to the others", (FINE,),
        (DEAD + "test_an_encode_worker_killed_while_it_encodes", KILLED),
    ),
    Cell("broker–encode", "hung", "right; as killed, after 3.5 s", (FINE,)),
    Cell("broker–encode", "slow", _SLOW, (FINE,)),
    Cell("broker–encode", "lost", _STUCK, (FINE,)),
    Cell("broker–encode", "duplicated", _TWICE, (FINE,)),
    Cell("broker–encode", "reordered", "right", (FINE,)),
    Cell("broker–encode", "stale", _EARLIER, (FINE,)),
    Cell("broker–encode", "corrupted", _REFUSED, (FINE,)),
    Cell(
        "encode–cache", "killed", "right; requests wait for the next cache and are encoded there", (FINE,), (KILLED,)
    ),
    Cell("encode–cache", "hung", "right; the memory stays mapped", (FINE,)),
    Cell("encode–cache", "slow", _SLOW, (FINE,)),
    Cell("encode–cache", "lost", _AGAIN, (FINE,), (SLOTS,)),
    Cell("encode–cache", "duplicated", _AGAIN, (FINE,)),
    Cell("encode–cache", "reordered", _AGAIN, (FINE,)),
    Cell("encode–cache", "stale", _AGAIN, (FINE,), (SLOTS,)),
    Cell("encode–cache", "corrupted", _AGAIN, (FINE,), (SLOTS,)),
    Cell("cache–prefill", "killed", "right; as above, or read from memory that is still mapped", (FINE,), (KILLED,)),
    Cell("cache–prefill", "hung", "right; the memory stays mapped", (FINE,)),
    Cell("cache–prefill", "slow", _SLOW, (FINE,)),
    Cell("cache–prefill", "lost", _AGAIN, (FINE,), (SLOTS,)),
    Cell("cache–prefill", "duplicated", "right", (FINE,)),
    Cell("cache–prefill", "reordered", _AGAIN, (FINE,)),
    Cell("cache–prefill", "stale", _AGAIN, (FINE,), (SLOTS,)),
    Cell("cache–prefill", "corrupted", _AGAIN, (FINE,), (SLOTS,)),
    Cell(
        "broker–prefill", "killed", "right; prefilled again from the cache, nothing is encoded again", (FINE,),
        (DEAD + "test_a_prefill_worker_killed_while_it_prefills", KILLED),
    ),
    Cell(
        "broker–prefill", "hung", "right; as killed, after 3.5 s. An engine that hangs beside a link that answers: "
        "after `hung_after_s`", (FINE,),
        ("tests/broker/test_core_faults.py::test_",),
    ),
    Cell("broker–prefill", "slow", _SLOW, (FINE,)),
    Cell("broker–prefill", "lost", "ends at its deadline, or is tried again when no step is made", (FINE, DEADLINE)),
    Cell("broker–prefill", "duplicated", _TWICE, (FINE,)),
    Cell("broker–prefill", "reordered", "right; a READY before its PREFILL: ends at its deadline", (FINE, DEADLINE)),
    Cell("broker–prefill", "stale", _EARLIER, (FINE,)),
    Cell("broker–prefill", "corrupted", _REFUSED, (FINE, DEADLINE)),
    Cell(
        "prefill–decode", "killed", "right; prefilled again. The decode worker's blocks are free as soon as the other "
        "engine is known to be gone", (FINE,),
        (LEAKS + "test_a_prefill_worker_killed_while_decode_waits",
         LEAKS + "test_a_decode_worker_killed_while_prefill_holds_blocks_for_it"),
    ),
    Cell(
        "prefill–decode", "hung", "right; prefilled again. The decode worker's blocks stay until the other goes on or "
        "dies, as it may still write", (FINE,),
        (LEAKS + "test_a_prefill_worker_that_hangs_may_still_write",),
    ),
    Cell("prefill–decode", "slow", _SLOW, (FINE,), (LEAKS + "test_both_aborted_during_the_push_keep_their_blocks",)),
    Cell(
        "prefill–decode", "lost", "ends at its deadline. A write that fails is refused, and the request is tried again",
        (FINE, DEADLINE), (LEAKS + "test_a_push_that_fails_ends_the_decode_request_with_an_error",),
    ),
    Cell("prefill–decode", "duplicated", _TWICE, (FINE,)),
    Cell("prefill–decode", "reordered", "right", (FINE,), (LEAKS + "test_both_aborted_before_decode_has_registered",)),
    Cell(
        "prefill–decode", "stale", _EARLIER + "; KV of another request is never taken for it", (FINE,),
        (LEAKS + "test_requests_whose_ids_differ_only_at_the_end_are_not_mixed_up",
         LEAKS + "test_a_registration_that_comes_after_the_lease_is_refused"),
    ),
    Cell(
        "prefill–decode", "corrupted", "a notification that cannot be read: as lost. Of the KV itself there is no "
        "checksum but the transport's", (), (LEAKS + "test_an_invalid_notification_does_no_harm",),
    ),
    Cell(
        "broker–decode", "killed", "right; goes on elsewhere from the tokens already sent. One that has begun and "
        "cannot be continued exactly: `worker_lost`", (FINE, "worker_lost"),
        (DEAD + "test_a_stream_whose_decode_worker_is_killed_goes_on_with_the_same_tokens", KILLED),
    ),
    Cell("broker–decode", "hung", "as killed, after 3.5 s", (FINE, "worker_lost"),
         (DEAD + "test_a_worker_that_is_stopped_by_a_signal_is_silent_and_its_request_goes_on_elsewhere",)),
    Cell("broker–decode", "slow", _SLOW, (FINE,)),
    Cell(
        "broker–decode", "lost", "right, later; tokens, of all requests of a step: the gap is seen, and each request "
        "goes on from what is there. One that cannot be continued exactly: `worker_lost`", (FINE, "worker_lost"),
    ),
    Cell("broker–decode", "duplicated", "right; tokens that are there already are dropped", (FINE,)),
    Cell("broker–decode", "reordered", "tokens out of order are a gap: as lost", (FINE, "worker_lost")),
    Cell("broker–decode", "stale", _EARLIER, (FINE,)),
    Cell("broker–decode", "corrupted", _REFUSED, (FINE, "worker_lost")),
    Cell(
        "broker–endpoint", "killed", "its clients' connections are lost; all that it had in flight is cancelled",
        ("connection lost",),
    ),
    Cell("broker–endpoint", "hung", "right, later; taken for lost after 3.5 s, it submits again", (FINE,)),
    Cell("broker–endpoint", "slow", _SLOW, (FINE,)),
    Cell(
        "broker–endpoint", "lost", "tokens: the gap is seen, and the request goes on from what is there, or fails: "
        "`engine_failed`; the end: at its deadline", (FINE, DEADLINE, "engine_failed"),
    ),
    Cell("broker–endpoint", "duplicated", "right; tokens that are there already are dropped", (FINE,)),
    Cell("broker–endpoint", "reordered", "tokens out of order are a gap: as lost", (FINE, "engine_failed")),
    Cell(
        "broker–endpoint", "stale", "what is left of an earlier life is for nobody", ("connection lost",),
        (BROKER_LOST + "test_what_an_earlier_broker_says_late_changes_nothing",),
    ),
    Cell("broker–endpoint", "corrupted", _REFUSED, (FINE, DEADLINE, "engine_failed")),
    Cell(
        "client–endpoint", "killed", "its request is cancelled, nothing is held", (),
        (COMING + "test_a_client_that_goes_away_cancels_its_request",
         COMING + "test_many_clients_that_go_away_at_any_moment_leave_nothing_held"),
    ),
    Cell(
        "client–endpoint", "hung", "loses its request and is told why", (),
        (SLOW_CLIENTS + "test_a_client_that_stops_reading_loses_its_request_and_is_told_why",),
    ),
    Cell("client–endpoint", "slow", "right, as long as not too much lies unread", (),
         (SLOW_CLIENTS + "test_a_client_that_reads_gets_more_than_may_lie_unread",)),
    Cell("client–endpoint", "lost", "TCP loses nothing while both ends live; else as killed", (),
         (SLOW_CLIENTS + "test_a_client_that_stops_reading_and_goes_leaves_nothing",)),
    Cell("client–endpoint", "duplicated", "the same request twice is two requests, also under one `X-Request-Id`", (),
         ("tests/pipeline/test_same_id.py::test_requests_of_one_client_id_at_once_get_their_own_answers",)),
    Cell("client–endpoint", "reordered", "requests are independent of their order", (),
         ("tests/pipeline/test_equal_to_plain_vllm.py::test_thirty_two_requests_at_once_are_equal",)),
    Cell("client–endpoint", "stale", "a cancel of what has ended cancels nothing; an expired upload is 404", (),
         ("tests/endpoint/test_cancel.py::test_a_request_is_cancelled_by_the_id_in_its_answer",
          "tests/endpoint/test_uploads.py::test_a_picture_lives_for_its_time_and_is_its_owners_only")),
    Cell("client–endpoint", "corrupted", "refused with a 4xx and a reason before any engine sees it", (),
         ("tests/pipeline/test_bad_input.py::test_a_bad_request_is_refused_with_a_reason",
          "tests/pipeline/test_bad_input.py::test_malformed_json_and_bodies_over_the_limit_are_refused")),
)  # fmt: skip
