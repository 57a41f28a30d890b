"""Identifiers of prompt items that are made of several patches. Pure; imports nothing.

vLLM takes an identifier for an opaque string: it keys the prefix cache and the encoder cache with it. Ours names all
the patches that the item's embeddings are joined of, in their order, so that whoever holds the identifier can find
them, and two items with the same identifier have the same embeddings.
"""

from __future__ import annotations

from collections.abc import Sequence

_JOINT = "+"


def identifier_of(patch_hashes: Sequence[str]) -> str:
    """The identifier of an item whose embeddings are these patches', one after the other."""
    return _JOINT.join(patch_hashes)


def patches_of(identifier: str) -> list[str]:
    """The patches that an item's embeddings are made of, in their order; the same one may come more than once."""
    return identifier.split(_JOINT)
