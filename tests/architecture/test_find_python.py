"""tools/find_python.sh against made-up interpreters: which one it takes, and its one line when there is none."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "find_python.sh"
SHELL = shutil.which("sh")


def fake_python(path: Path, version: str) -> Path:
    """A program that answers find_python's question as that version would: its own path, or exit 1 when too old."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = tuple(map(int, version.split("."))) >= (3, 12)
    path.write_text(f"#!{SHELL}\n" + (f"echo {path}\n" if new else "echo 'too old' >&2; exit 1\n"))
    path.chmod(0o755)
    return path


@pytest.fixture
def find(tmp_path: Path):
    """Runs the script with a PATH and a HOME that hold only what the test put there."""

    def run(**environment: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [SHELL, str(SCRIPT)],
            env={"PATH": str(tmp_path / "bin"), "HOME": str(tmp_path / "home"), **environment},
            capture_output=True,
            text=True,
        )

    return run


def test_only_an_old_python_is_one_line_and_exit_2(tmp_path: Path, find) -> None:
    fake_python(tmp_path / "bin/python3", "3.11")
    fake_python(tmp_path / "home/.pyenv/versions/3.9.18/bin/python3", "3.9")
    result = find()
    assert result.returncode == 2
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1 and "3.12" in result.stderr and "PYTHON=" in result.stderr


def test_order_on_path(tmp_path: Path, find) -> None:
    later = fake_python(tmp_path / "bin/python3", "3.14")
    assert find().stdout.strip() == str(later)
    middle = fake_python(tmp_path / "bin/python3.13", "3.13")
    assert find().stdout.strip() == str(middle)
    first = fake_python(tmp_path / "bin/python3.12", "3.12")
    assert find().stdout.strip() == str(first)


def test_a_shim_that_does_not_run_is_passed_over_for_pyenvs_version(tmp_path: Path, find) -> None:
    fake_python(tmp_path / "bin/python3.12", "3.11")
    fake_python(tmp_path / "home/.pyenv/versions/3.13.0/bin/python3", "3.13")
    wanted = fake_python(tmp_path / "home/.pyenv/versions/3.12.1/bin/python3", "3.12")
    result = find()
    assert (result.returncode, result.stdout.strip(), result.stderr) == (0, str(wanted), "")


def test_uv_is_asked_last(tmp_path: Path, find) -> None:
    wanted = fake_python(tmp_path / "uv-python", "3.12")
    uv = tmp_path / "bin/uv"
    uv.parent.mkdir()
    uv.write_text(f'#!{SHELL}\n[ "$1 $2 $3" = "python find >=3.12" ] && echo {wanted}\n')
    uv.chmod(0o755)
    assert find().stdout.strip() == str(wanted)


def test_the_variable_alone_decides(tmp_path: Path, find) -> None:
    fake_python(tmp_path / "bin/python3.12", "3.12")
    chosen = fake_python(tmp_path / "mine", "3.13")
    assert find(PYTHON=str(chosen)).stdout.strip() == str(chosen)
    old = fake_python(tmp_path / "old", "3.11")
    result = find(PYTHON=str(old))
    assert (result.returncode, result.stdout) == (2, "")
    assert len(result.stderr.splitlines()) == 1 and str(old) in result.stderr


def test_the_question_itself_refuses_old_and_accepts_new_interpreters(tmp_path: Path) -> None:
    """The fakes above only answer; the real condition is read out of the script and run under claimed versions."""
    question = re.search(r"-c '([^']+)'", SCRIPT.read_text()).group(1)
    for version, accepted in (((3, 11, 9), False), ((3, 12, 0), True), ((3, 14, 0), True)):
        claimed = f"import sys; sys.version_info = {version}; " + question
        result = subprocess.run([sys.executable, "-c", claimed], capture_output=True, text=True)
        assert (result.returncode == 0) is accepted, version
        assert (result.stdout.strip() == sys.executable) is accepted
