"""What the generated pages share: the note at their top, docstrings and defaults of structs.

Lives in a developer's process; pure.
"""

from __future__ import annotations

import inspect
from typing import Any

import msgspec


def note(source: str) -> str:
    """The first lines of a page, which say where it comes from."""
    return f"<!-- Written by `python -m epd.docs` (`make docs`) from {source}. Do not edit this page. -->\n"


def doc(struct: Any) -> str:
    """A struct's docstring."""
    return inspect.cleandoc(struct.__doc__)


def default(field: Any) -> str:
    """A field's default, as pages show it."""
    if field.default_factory is not msgspec.NODEFAULT:
        value = field.default_factory()
    elif field.default is not msgspec.NODEFAULT:
        value = field.default
    else:
        return "required"
    if value is None:
        return "nil"
    if isinstance(value, msgspec.Struct):
        return "all defaults"
    text = f"`{str(value).lower()}`" if isinstance(value, bool) else f"`{value!r}`".replace("'", '"')
    if field.name.endswith(("_bytes", "max_pixels")) and value and value % (1 << 20) == 0:
        text += f" ({value >> 20} Mi)"
    return text
