"""The user's engine options, checked and converted before anything is loaded: names, types, choices, bounds.

Lives in the process of the command line; pure but for reading vLLM's source (`engine_source`). Everything that
people write for `vllm serve` is accepted: JSON (`epd.config`), `8k`, `True`.
"""

from __future__ import annotations

import difflib
import json
import operator
import re
from collections.abc import Collection, Mapping
from typing import Any

import msgspec

from epd.config import Config, ConfigError
from epd.local.engine_source import ENGINE, SERVE, Option, options_of

_STAGES = ("encode", "prefill", "decode")
_SCALES = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_WORDS = {"true": True, "false": False}
_COMPARE = {
    "gt": (operator.gt, "more than"),
    "ge": (operator.ge, "at least"),
    "lt": (operator.lt, "less than"),
    "le": (operator.le, "at most"),
}
_SAID = {
    "bool": "true or false", "int": "a whole number", "float": "a number", "str": "a text", "None": "",
    "table": "a table or JSON object", "list": "a list",
}  # fmt: skip
_NUMBERS_SHOWN = 12


def checked(config: Config) -> Config:
    """Returns `config` with its engine options as vLLM takes them.

    Raises:
        ConfigError: vLLM has no such option, or does not take the value; the text names the nearest one that it has.
    """
    engine = _checked(config.engine, ENGINE, "engine option")
    stages = {}
    for name in _STAGES:
        stage = getattr(config, name)
        settled = _checked(stage.engine, ENGINE, f"{name} engine option")
        stages[name] = msgspec.structs.replace(stage, engine=settled)
    serve = _checked(config.endpoint.serve, SERVE, "option of [endpoint.serve]")
    endpoint = msgspec.structs.replace(config.endpoint, serve=serve)
    return msgspec.structs.replace(config, engine=engine, endpoint=endpoint, **stages)


def _checked(given: Mapping[str, Any], what: str, called: str) -> dict[str, Any]:
    known = options_of(what)
    if not known:
        return dict(given)
    settled = {}
    for name, value in given.items():
        if name not in known:
            raise ConfigError(f"{called} {name!r}: vLLM has no such option{_nearest(name, known)}")
        try:
            settled[name] = settle(known[name], value, may_be_auto=name == "max_model_len")
        except ValueError as error:
            raise ConfigError(f"{called} {name}={_shown(value)}: {error}") from None
    return settled


def settle(option: Option, value: Any, *, may_be_auto: bool = False) -> Any:
    """A value as vLLM takes it for `option`.

    Raises:
        ValueError: vLLM does not take it; the text says what it takes.
    """
    if may_be_auto and value == "auto":
        return -1
    found = _of_kind(option, value)
    if found is _NONE_OF_THESE:
        raise ValueError(f"must be {_takes(option)}{_nearest(value, option.choices)}")
    if isinstance(found, int | float) and not isinstance(found, bool):
        for name, bound in option.bounds.items():
            holds, said = _COMPARE[name]
            if not holds(found, bound):
                raise ValueError(f"must be {said} {bound:g}")
    if isinstance(found, dict) and option.keys:
        for key in found:
            if key.replace("-", "_") not in option.keys and "any" not in option.kinds:
                raise ValueError(f"{key!r} is not known to vLLM{_nearest(key, option.keys)}")
    return found


_NONE_OF_THESE = object()


def _of_kind(option: Option, value: Any) -> Any:
    """`value` as one of the kinds that the option takes."""
    kinds = option.kinds
    if value in ("None", "") and "None" in kinds:
        return None
    if "any" in kinds or any(value == each and type(value) is type(each) for each in option.choices):
        return value
    match value:
        case bool():
            return value if "bool" in kinds else _NONE_OF_THESE
        case int():
            if kinds & {"int", "float"}:
                return value
            return str(value) if "str" in kinds else _NONE_OF_THESE
        case float():
            if "float" in kinds:
                return value
            return int(value) if "int" in kinds and value.is_integer() else _NONE_OF_THESE
        case dict():
            return value if "table" in kinds else _NONE_OF_THESE
        case list():
            return value if "list" in kinds else _NONE_OF_THESE
        case str():
            return _of_text(option, value)
    return _NONE_OF_THESE


def _of_text(option: Option, value: str) -> Any:
    kinds = option.kinds
    if "bool" in kinds and value.lower() in _WORDS:
        return _WORDS[value.lower()]
    if "int" in kinds and (found := re.fullmatch(r"(\d+(?:\.\d+)?)([kmgtKMGT]?)", value)):
        number = float(found[1]) * _SCALES.get(found[2], 1)
        if number.is_integer():
            return int(number)
    if value.startswith(("{", "[")) and kinds & {"table", "list"}:
        try:
            return _of_kind(option, json.loads(value))
        except ValueError:
            return value if "str" in kinds else _NONE_OF_THESE
    if "str" in kinds:
        return value
    return [each.strip() for each in value.split(",")] if "list" in kinds else _NONE_OF_THESE


def _takes(option: Option) -> str:
    """What an option takes, in words."""
    kinds = [_SAID[kind] for kind in _SAID if kind in option.kinds and _SAID[kind]]
    if option.choices:
        shown = ", ".join(str(each) for each in option.choices[:_NUMBERS_SHOWN])
        kinds.append(f"one of {shown}" + (", ..." if len(option.choices) > _NUMBERS_SHOWN else ""))
    return ", or ".join(kinds)


def _nearest(wrong: Any, right: Collection[Any]) -> str:
    """The known word most like a wrong one, as a question; nothing if none is like it."""
    words = {str(each).lower(): str(each) for each in right}
    found = difflib.get_close_matches(str(wrong).lower(), words, n=1, cutoff=0.5)
    return f"; did you mean {words[found[0]]!r}?" if found else ""


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else msgspec.json.encode(value, enc_hook=str).decode()
    return text if len(text) <= 80 else f"{text[:77]}..."
