"""Which prefill and which decode worker a request gets, and how much room it takes there. Pure; least loaded first."""

from __future__ import annotations

import dataclasses

from broker.registry import Peer


@dataclasses.dataclass(frozen=True, slots=True)
class Placement:
    """The workers chosen for a request, and the KV tokens set aside for it on the decode worker, if it needs one."""

    prefill: Peer
    decode: Peer | None
    reserved_tokens: int


def too_large(num_tokens: int, prefills: list[Peer], decodes: list[Peer]) -> str:
    """Why no worker could ever take a prompt of so many tokens, or an empty string."""
    for stage, peers in (("prefill", prefills), ("decode", decodes)):
        room = max((peer.info.kv_capacity_tokens for peer in peers), default=0)
        if peers and num_tokens + 1 > room:
            return f"the prompt has {num_tokens} tokens; the {stage} workers' KV cache holds {room}"
    return ""


def place(num_tokens: int, num_outputs: int, prefills: list[Peer], decodes: list[Peer] | None) -> Placement | None:
    """The least loaded prefill and decode worker with room for a request, or None while there is no room.

    Args:
        num_tokens: its prompt, with the output of earlier legs.
        num_outputs: the output to set KV tokens aside for.
        prefills: the prefill workers to choose from.
        decodes: the decode workers to choose from; None where it needs none.

    A decode worker has room when the tokens it has been promised fit its KV cache and its batch has a place: then its
    side of a KV push is always registered at once, and a finished prefill never waits for memory there. An idle worker
    takes any request that fits it at all. Where no decode worker is needed, the same holds for the prefill worker: more
    than it can have at a time waits its turn at the broker.
    """
    need = num_tokens + num_outputs

    def has_room(peer: Peer) -> bool:
        if not peer.requests:
            return num_tokens + 1 <= peer.info.kv_capacity_tokens
        return peer.load_tokens + need <= peer.info.kv_capacity_tokens and len(peer.requests) < peer.info.max_num_seqs

    def least_loaded(peers: list[Peer]) -> Peer | None:
        return min(peers, key=lambda peer: (peer.load_tokens, len(peer.requests)), default=None)

    if decodes is None:
        prefill = least_loaded([peer for peer in prefills if has_room(peer)])
        return Placement(prefill, None, 0) if prefill else None
    prefill = least_loaded([peer for peer in prefills if num_tokens + 1 <= peer.info.kv_capacity_tokens])
    decode = least_loaded([peer for peer in decodes if has_room(peer)])
    return Placement(prefill, decode, need) if prefill and decode else None
