"""Identifiers of prompt items that consist of several patches. Pure; imports nothing.

To vLLM an identifier is an opaque string, the key of the prefix cache and the encoder cache. Ours names all the patches
whose embeddings make up the item, in order, so that whoever has the identifier can find them, and two items with the
same identifier have the same embeddings.
"""

from __future__ import annotations

from collections.abc import Sequence

_JOINT = "+"


def identifier_of(patch_hashes: Sequence[str]) -> str:
    """The identifier of an item whose embeddings are those of these patches, one after the other."""
    return _JOINT.join(patch_hashes)


def patches_of(identifier: str) -> list[str]:
    """The patches whose embeddings make up an item, in order; the same one may occur more than once."""
    return identifier.split(_JOINT)
