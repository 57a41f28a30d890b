"""Which options vLLM's engine has, and of what types: read from its source, never imported, so it takes no time.

Lives in whatever process asks; reads files of the installed vLLM. Written against vLLM 0.32
(`vllm.engine.arg_utils`, `vllm.config`, `vllm.entrypoints.launchers.cli_args`). What is not understood here is left
to vLLM, which refuses it when it starts.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

ENGINE, SERVE = "EngineArgs", "serve"
_BOUNDS = ("gt", "ge", "lt", "le")
_PLAIN = ("bool", "int", "float", "str", "None")
_TABLES = ("dict", "Mapping")
_LISTS = ("list", "set", "tuple", "Sequence")


class Option(msgspec.Struct, frozen=True, kw_only=True):
    """One option.

    Attributes:
        kinds: what it takes: "bool", "int", "float", "str", "None", "table", "list"; "any" where that is not known.
        choices: values that it takes besides.
        bounds: "gt", "ge", "lt", "le" -> the number that it is compared with.
        keys: of a table whose keys are known, these.
    """

    kinds: frozenset[str]
    choices: tuple[Any, ...] = ()
    bounds: dict[str, float] = {}
    keys: frozenset[str] = frozenset()


def is_installed() -> bool:
    """Whether vLLM is installed."""
    return importlib.util.find_spec("vllm") is not None


@functools.cache
def options_of(what: str = ENGINE) -> dict[str, Option]:
    """The options of an engine (`ENGINE`), or of `vllm serve` with those of its engine (`SERVE`), by name.

    Empty if there is no vLLM, or one whose source looks different.
    """
    spec = importlib.util.find_spec("vllm")
    roots = spec.submodule_search_locations if spec is not None else None
    if not roots:
        return {}
    root = Path(next(iter(roots)))
    paths = [root / "engine" / "arg_utils.py", *sorted((root / "config").glob("*.py"))]
    names = ["EngineArgs"]
    if what == SERVE:
        paths.append(root / "entrypoints" / "launchers" / "cli_args.py")
        names += ["AsyncEngineArgs", "BaseFrontendArgs", "FrontendArgs"]
    try:
        source = _Source([ast.parse(path.read_text("utf-8")) for path in paths if path.exists()])
    except (OSError, SyntaxError):
        return {}
    flags = {name: Option(kinds=frozenset({"any"})) for name in source.flags()} if what == SERVE else {}
    return flags | {name: source.option(field) for each in names for name, field in source.fields(each)}


class _Source:
    """The classes, named types and flags of a few modules."""

    def __init__(self, modules: list[ast.Module]) -> None:
        self._classes: dict[str, ast.ClassDef] = {}
        self._types: dict[str, ast.expr] = {}
        self._modules = modules
        for node in (each for module in modules for each in module.body):
            if isinstance(node, ast.ClassDef):
                self._classes[node.name] = node
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                self._types.setdefault(node.targets[0].id, node.value)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
                self._types.setdefault(node.target.id, node.value)

    def fields(self, name: str) -> Iterator[tuple[str, ast.AnnAssign]]:
        """The public fields of a class, and their declared types."""
        if name not in self._classes:
            return
        for node in self._classes[name].body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id[0] != "_":
                yield node.target.id, node

    def flags(self) -> Iterator[str]:
        """Options that are added by name, as `parser.add_argument("--name")`."""
        for node in (each for module in self._modules for each in ast.walk(module)):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument" and node.args:
                flag = node.args[0]
                if isinstance(flag, ast.Constant) and str(flag.value).startswith("--"):
                    yield str(flag.value).removeprefix("--").replace("-", "_")

    def option(self, field: ast.AnnAssign) -> Option:
        """What a field takes."""
        kinds: set[str] = set()
        choices: list[Any] = []
        keys: set[str] = set()
        self._read(field.annotation, kinds, choices, keys)
        return Option(
            kinds=frozenset(kinds), choices=tuple(choices), bounds=self._bounds(field.value), keys=frozenset(keys)
        )

    def _read(self, node: ast.expr, kinds: set[str], choices: list[Any], keys: set[str]) -> None:
        match node:
            case ast.Constant(value=None):
                kinds.add("None")
            case ast.Constant(value=str(text)):
                self._read(ast.parse(text, mode="eval").body, kinds, choices, keys)
            case ast.BinOp(left=left, op=ast.BitOr(), right=right):
                self._read(left, kinds, choices, keys)
                self._read(right, kinds, choices, keys)
            case ast.Subscript(value=ast.Name(id="Literal"), slice=inner):
                self._literals(inner, kinds, choices)
            case ast.Subscript(value=ast.Name(id=name)) if name in _TABLES:
                kinds.add("table")
            case ast.Subscript(value=ast.Name(id=name)) if name in _LISTS:
                kinds.add("list")
            case ast.Name(id=name) if name in _PLAIN:
                kinds.add(name)
            case ast.Name(id=name) if name in _TABLES:
                kinds.add("table")
            case ast.Name(id=name) if name in self._types:
                self._read(self._types[name], kinds, choices, keys)
            case ast.Name(id=name) if self._is_config(name):
                kinds.add("table")
                keys.update(each for each, _ in self.fields(name))
            case _:
                kinds.add("any")

    def _literals(self, node: ast.expr, kinds: set[str], choices: list[Any]) -> None:
        for each in node.elts if isinstance(node, ast.Tuple) else [node]:
            if isinstance(each, ast.Constant):
                choices.append(each.value)
            else:
                self._read(each, kinds, choices, set())

    def _is_config(self, name: str) -> bool:
        """Whether a class is a configuration whose fields are all visible here."""
        node = self._classes.get(name)
        return node is not None and name.endswith("Config") and not node.bases

    def _bounds(self, default: ast.expr | None) -> dict[str, float]:
        """The bounds of a field whose default is a configuration's field (`CacheConfig.gpu_memory_utilization`)."""
        match default:
            case ast.Attribute(value=ast.Name(id=owner), attr=name):
                pass
            case ast.Call(func=ast.Name(id="get_field"), args=[ast.Name(id=owner), ast.Constant(value=str(name))]):
                pass
            case _:
                return {}
        field = dict(self.fields(owner)).get(name)
        if field is None or not isinstance(field.value, ast.Call) or getattr(field.value.func, "id", "") != "Field":
            return {}
        found = {}
        for word in field.value.keywords:
            if word.arg in _BOUNDS:
                try:
                    found[word.arg] = float(ast.literal_eval(word.value))
                except (ValueError, TypeError):
                    continue
        return found
