"""Whose request this is: what may be said of an API key without revealing it.

Lives in the endpoint process; pure.
"""

from __future__ import annotations

import hashlib

from epd.endpoint.http.asgi import Scope

_TENANT_CHARS = 16


def owner_of(scope: Scope, *, has_keys: bool) -> str:
    """A digest of a request's API key; nothing if clients have no keys."""
    if not has_keys:
        return ""
    header: bytes = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
    return hashlib.sha256(header.partition(b" ")[2].strip()).hexdigest()


def tenant_of(owner: str, cache_salt: str | None) -> str:
    """Whose request it is, for fairness: its key's digest, shortened, or its `cache_salt`, or nobody's."""
    return owner[:_TENANT_CHARS] or cache_salt or ""
