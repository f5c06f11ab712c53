"""The tools of the repository, as typed in a process of their own, or called in this one, without its imports."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[3] / "tools"


def typed(tool: str, *words: object) -> subprocess.CompletedProcess:
    """A tool run as from a shell."""
    return subprocess.run([sys.executable, str(TOOLS / tool), *map(str, words)], capture_output=True, text=True)


def called(capsys: pytest.CaptureFixture, tool: str, *words: object) -> subprocess.CompletedProcess:
    """The same in this process."""
    spec = importlib.util.spec_from_file_location(tool.removesuffix(".py"), TOOLS / tool)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    capsys.readouterr()
    try:
        code = module.main([str(word) for word in words])
    except SystemExit as left:
        code = left.code
    shown = capsys.readouterr()
    return subprocess.CompletedProcess([tool, *words], code, shown.out, shown.err)
