"""Which folder may import which: read from the source of all four packages."""

import ast
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OURS = ("epd", "broker", "workers", "cache")

# The composition root: the only part of epd that puts the daemons together.
COMPOSITION_ROOT = ("epd/cli.py", "epd/cli/*", "epd/local/*", "epd/demo/*")

# What each folder may import of ours, itself apart. A name stands for the module and all below it.
ALLOWED = {
    "epd": (),
    "broker": ("epd", "cache.index", "cache.extents"),
    "cache": ("epd",),
    "workers": ("epd", "cache"),
}

# The only files that may import the engine.
ENGINE = ("torch", "vllm")
ENGINE_FILES = (
    "epd/endpoint/engine/*",
    "epd/endpoint/http/options.py",
    "epd/endpoint/http/server.py",
    "epd/endpoint/media/connector.py",
    "epd/endpoint/media/decoding.py",
    "epd/endpoint/media/pictures.py",
    "epd/endpoint/media/processor_cache.py",
    "epd/endpoint/media/repeats.py",
    "epd/endpoint/media/routes.py",
    "epd/multimodal/*",
    "epd/planning/weights.py",
    "epd/local/*",
    "epd/demo/*",
    "workers/*",
    "cache/ec_connector.py",
    "cache/tensors.py",
    "cache/pools/cuda*.py",
)


IMPORTERS = ("__import__", "import_module", "importlib.import_module")


def matches(path: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(path, pattern) for pattern in patterns)


def is_within(module: str, names: tuple[str, ...]) -> bool:
    return any(module == name or module.startswith(name + ".") for name in names)


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def imports_of(source: str, package: str) -> list[tuple[int, str]]:
    """The line and full name of each module that a source imports, wherever in it and however it is written.

    `package` is the dotted package the source is in, for relative imports.
    """
    found: list[tuple[int, str]] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"  # `from cache import index` imports cache.index
                found.append((node.lineno, inner if is_module(inner) else base))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in IMPORTERS and node.args:
            name = ast.literal_eval(node.args[0]) if isinstance(node.args[0], ast.Constant) else None
            found += [(node.lineno, name)] if isinstance(name, str) else []
    return found


def our_imports() -> list[tuple[str, int, str]]:
    """The file, line and module of each import in the four packages."""
    found = []
    for top in OURS:
        files = sorted((ROOT / top).rglob("*.py"))
        assert files, f"{top}/ has no Python files"
        for file in files:
            path = file.relative_to(ROOT)
            for line, module in imports_of(file.read_text(encoding="utf-8"), ".".join(path.parent.parts)):
                found.append((path.as_posix(), line, module))
    return found


def test_each_folder_imports_only_the_layers_below_it():
    wrong = [
        f"{path}:{line} imports {module}"
        for path, line, module in our_imports()
        if is_within(module, OURS)
        and not matches(path, COMPOSITION_ROOT)
        and not is_within(module, (path.split("/")[0], *ALLOWED[path.split("/")[0]]))
    ]
    assert not wrong, "\n".join(wrong)


def test_the_engine_is_imported_only_where_it_is_touched():
    wrong = [
        f"{path}:{line} imports {module}"
        for path, line, module in our_imports()
        if is_within(module, ENGINE) and not matches(path, ENGINE_FILES)
    ]
    assert not wrong, "\n".join(wrong)


def test_broker_cache_daemon_and_client_start_without_the_engine():
    code = "import sys, broker.daemon, cache.daemon, epd, epd.client\n"
    code += f"print([name for name in {ENGINE} if name in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("package", "source", "module"),
    [
        ("cache", "import vllm.config as c", "vllm.config"),
        ("cache", "from torch import nn", "torch"),
        ("cache", "from broker import *", "broker"),
        ("cache", "def f():\n    import vllm", "vllm"),
        ("cache", "from . import daemon", "cache"),
        ("cache", "from .pools import shm", "cache.pools"),
        ("cache.pools", "from ..extents import Extents", "cache.extents"),
        ("cache", "from importlib import import_module\nimport_module('torch')", "torch"),
    ],
)
def test_every_way_to_write_an_import_is_seen(package, source, module):
    assert any(is_within(found, (module,)) for _, found in imports_of(source, package))
