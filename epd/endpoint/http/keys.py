"""Whose request this is: what is told of an API key without telling the key.

Lives in the endpoint process; pure.
"""

from __future__ import annotations

import hashlib

from epd.endpoint.http.asgi import Scope

_TENANT_CHARS = 16


def owner_of(scope: Scope, *, has_keys: bool) -> str:
    """A digest of the API key that a request came with; nothing where clients have no keys."""
    if not has_keys:
        return ""
    header: bytes = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
    return hashlib.sha256(header.partition(b" ")[2].strip()).hexdigest()


def tenant_of(owner: str, cache_salt: str | None) -> str:
    """Whose a request is, for fairness: its key's digest, shortened, or its `cache_salt`, or nobody's."""
    return owner[:_TENANT_CHARS] or cache_salt or ""
