"""Which prefill and which decode worker a request gets, and how much room it takes there. Pure; least loaded first."""

from __future__ import annotations

import dataclasses

from broker.registry import Peer
from epd.messages import Submit


@dataclasses.dataclass(frozen=True, slots=True)
class Placement:
    """The workers chosen for a request, and the KV tokens set aside for it on the decode worker."""

    prefill: Peer
    decode: Peer
    reserved_tokens: int


def reserve_tokens(submit: Submit, output_reserve: int) -> int:
    """KV tokens to set aside for a request: its prompt and up to `output_reserve` tokens of output."""
    return submit.num_prompt_tokens + min(submit.max_tokens, output_reserve)


def too_large(submit: Submit, prefills: list[Peer], decodes: list[Peer]) -> str:
    """Why no worker could ever take this request, or an empty string."""
    for stage, peers in (("prefill", prefills), ("decode", decodes)):
        room = max((peer.info.kv_capacity_tokens for peer in peers), default=0)
        if peers and submit.num_prompt_tokens + 1 > room:
            return f"the prompt has {submit.num_prompt_tokens} tokens; the {stage} workers' KV cache holds {room}"
    return ""


def place(submit: Submit, prefills: list[Peer], decodes: list[Peer], output_reserve: int) -> Placement | None:
    """The least loaded prefill and decode worker with room for the request, or None while there is no room.

    A decode worker has room when the tokens it has been promised fit its KV cache and its batch has a place: then its
    side of a KV push is always registered at once, and a finished prefill never waits for memory there. An idle worker
    takes any request that fits it at all.
    """
    need = reserve_tokens(submit, output_reserve)

    def has_room(peer: Peer) -> bool:
        if not peer.requests:
            return submit.num_prompt_tokens + 1 <= peer.info.kv_capacity_tokens
        return peer.load_tokens + need <= peer.info.kv_capacity_tokens and len(peer.requests) < peer.info.max_num_seqs

    roomy = [peer for peer in decodes if has_room(peer)]
    fitting = [peer for peer in prefills if submit.num_prompt_tokens + 1 <= peer.info.kv_capacity_tokens]
    if not roomy or not fitting:
        return None
    return Placement(
        min(fitting, key=lambda peer: (peer.load_tokens, len(peer.requests))),
        min(roomy, key=lambda peer: (peer.load_tokens, len(peer.requests))),
        need,
    )
