"""The structure that the library promises: its import order, its sizes, and what a tracked file may not hold."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# A package may import from itself and from those before it.
ORDER = (
    "positions",
    "parallel",
    "loss",
    "attention",
    "runtime",
    "model",
    "data",
    "ruler",
    "runs",
    "training",
    "checkpoint",
    "evaluation",
    "analysis",
    "planning",
    "report",
)
TORCH_ALONE = ("positions", "parallel", "loss")
FILE_LINES, FUNCTION_LINES, TOOL_LINES = 400, 60, 80


def tracked_files() -> list[Path]:
    """Files of the working tree that git tracks, or would on `git add`."""
    listing = subprocess.run(
        ["git", "-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listing.returncode != 0:
        pytest.skip(f"needs a git checkout to know which files are tracked: {listing.stderr.strip()}")
    return [ROOT / name for name in listing.stdout.split("\0") if name and (ROOT / name).is_file()]


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def imported_modules(source: str, package: str) -> Iterator[str]:
    """Absolute names of all modules that `source`, lying in the dotted `package`, imports at any depth of nesting.

    `from a.b import c` gives both a.b and a.b.c, as c may be a module.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, base]) if base else ".".join(parents)
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def import_violations(source: str, subpackage: str) -> list[str]:
    """Imports in `source`, a direct module of megatron_rpsd.`subpackage`, that the order forbids."""
    found = []
    for name in imported_modules(source, f"megatron_rpsd.{subpackage}"):
        parts = name.split(".")
        if parts[0] == "megatron" and subpackage in TORCH_ALONE:
            found.append(f"{subpackage} must run without Megatron, imports {name}")
        if subpackage == "positions" and parts[0] not in {*sys.stdlib_module_names, "torch", "numpy", "megatron_rpsd"}:
            found.append(f"positions runs with torch and numpy alone, imports {name}")
        below = ORDER[ORDER.index(subpackage) + 1 :]
        if parts[0] == "megatron_rpsd" and len(parts) > 1 and parts[1] in below:
            found.append(f"{subpackage} comes before {parts[1]}, imports {name}")
    return sorted(set(found))


def long_functions(source: str) -> list[str]:
    return [
        f"{node.name} has {node.end_lineno - node.lineno + 1} lines"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno - node.lineno + 1 >= FUNCTION_LINES
    ]


def swallowed_exceptions(source: str) -> list[int]:
    """Lines of handlers that catch everything and do nothing."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or (isinstance(node.type, ast.Name) and node.type.id in ("Exception", "BaseException")))
        and all(isinstance(step, ast.Pass) for step in node.body)
    ]


# The words are put together here so that this file does not hold them.
FORBIDDEN_TEXT = {
    "a note of unfinished work": re.compile(r"\b(?:TO" + r"DO|FIX" + r"ME)\b"),
    "a path of one machine": re.compile(r"(?<![\w.$}~-])/(?:wor" + r"k|ro" + r"ot|tmp/" + r"w)(?:/|\b(?![\w.-]))"),
    "a package registry's host": re.compile(r"py" + r"pi\.org|files\.python" + r"hosted"),
}


def forbidden_text(text: str) -> list[str]:
    return [f"{what}: {match.group()!r}" for what, rule in FORBIDDEN_TEXT.items() for match in rule.finditer(text)]


@pytest.mark.parametrize("subpackage", ORDER)
def test_imports_point_up_the_order(subpackage: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}: {line}"
        for path in python_files(f"megatron_rpsd/{subpackage}")
        for line in import_violations(path.read_text(), subpackage)
    ]
    assert not found, "\n".join(found)


def test_every_subpackage_has_its_place() -> None:
    folders = {path.parent.name for path in (ROOT / "megatron_rpsd").glob("*/*.py")}
    assert folders <= set(ORDER), f"not in the order: {sorted(folders - set(ORDER))}"


def test_every_package_says_what_it_is() -> None:
    silent = []
    for folder in {path.parent for path in python_files("megatron_rpsd")}:
        init = folder / "__init__.py"
        if not init.is_file() or not ast.get_docstring(ast.parse(init.read_text())):
            silent.append(str(init.relative_to(ROOT)))
    assert not silent, f"no module docstring: {sorted(silent)}"


def test_sizes() -> None:
    found = []
    for path in python_files("megatron_rpsd", "tools", "examples", "tests"):
        source, name = path.read_text(), path.relative_to(ROOT)
        lines = len(source.splitlines())
        if lines >= FILE_LINES or (name.parts[0] == "tools" and lines > TOOL_LINES):
            found.append(f"{name} has {lines} lines")
        found.extend(f"{name}: {line}" for line in long_functions(source))
    assert not found, "\n".join(found)


def test_no_drawer_for_odds_and_ends() -> None:
    drawers = [path for path in python_files("megatron_rpsd", "tools", "examples", "tests") if path.stem == "utils"]
    assert not drawers, f"name them after what they do: {drawers}"


def test_no_swallowed_exceptions() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in python_files("megatron_rpsd", "tools", "examples", "tests")
        for line in swallowed_exceptions(path.read_text())
    ]
    assert not found, "\n".join(found)


def test_tracked_files_hold_no_private_text() -> None:
    found = []
    for path in tracked_files():
        raw = path.read_bytes()
        if b"\0" not in raw:
            found.extend(f"{path.relative_to(ROOT)}: {line}" for line in forbidden_text(raw.decode("utf-8")))
    assert not found, "\n".join(found)


def test_the_rules_find_what_they_forbid() -> None:
    down = (
        "import megatron_rpsd.loss.x",
        "from megatron_rpsd import loss",
        "from ..loss.x import y",
        "from .. import loss",
    )
    for line in down:
        assert import_violations(line, "parallel"), line
        assert not import_violations(line, "loss"), line
    assert import_violations("def f():\n    from megatron.core import x", "loss")
    assert not import_violations("from megatron.core import x\nimport megatron_rpsd.loss", "attention")
    assert import_violations("import safetensors", "positions") and not import_violations("import math", "positions")
    body = "\n".join(["def f():"] + ["    x = 1"] * (FUNCTION_LINES - 1))
    assert long_functions(body) and not long_functions(body.rsplit("\n", 1)[0])
    assert swallowed_exceptions("try:\n    f()\nexcept Exception:\n    pass") == [3]
    assert not swallowed_exceptions("try:\n    f()\nexcept KeyError:\n    pass")
    for text in (
        "cd /wor" + "k/main",
        "'/ro" + "ot'",
        "/tmp/" + "w/x",
        "x  # FIX" + "ME",
        "https://py" + "pi.org/simple",
    ):
        assert forbidden_text(text), text
    for text in ("a/work/b", "runs/root", "/tmp/words", "/workspace/x", "$HOME/work/x"):
        assert not forbidden_text(text), text
