"""One cluster for all tests of this folder, and what a run on it needs."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distributed.corpus import run_arguments, write_corpus
from tests.ruler_prompts import tiny_reader
from tests.slurm.cluster import Cluster, missing
from tests.slurm.fast_python import SOCKET

ROOT = Path(__file__).resolve().parents[2]
_SERVER = Path(__file__).with_name("fast_python.py")
MANY = 4000
"""Steps of a run that does not end by itself while a test looks."""
CONTAINER = "apptainer exec --nv /images/rpsd.sif"

# It writes down what it was started with, fails where it is told to, and starts the rest.
_APPTAINER = """\
#!/bin/bash
echo "$*" >> "$APPTAINER_LOG"
if [[ -n "${APPTAINER_FAILS:-}" && "$*" == *"$APPTAINER_FAILS"* ]]; then
    echo "FATAL: no such image" >&2
    exit 3
fi
shift 3
exec "$@"
"""


@pytest.fixture(scope="session")
def container(tmp_path_factory):
    """Variables that put a stand-in for apptainer around every process; `log` is what it was started with."""
    folder = tmp_path_factory.mktemp("container")
    program = folder / "apptainer"
    program.write_text(_APPTAINER)
    program.chmod(0o755)

    def variables(log: Path, fails: str = "") -> dict[str, str]:
        path = f"{folder}{os.pathsep}{os.environ['PATH']}"
        return {"PATH": path, "RPSD_WRAPPER": CONTAINER, "APPTAINER_LOG": str(log), "APPTAINER_FAILS": fails}

    return variables


@pytest.fixture(scope="session")
def cluster():
    """Two nodes; skipped, with the reason, where Slurm is absent."""
    reason = missing()
    if reason:
        pytest.skip(reason)
    root = Path(tempfile.mkdtemp(prefix="slurm"))  # short: a socket's path may have 107 characters
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, root)
        python = stack.enter_context(fast_python(root))
        running = stack.enter_context(Cluster(root))
        running.environment |= {"RPSD_ROOT": str(ROOT), "RPSD_RANKS_PER_NODE": "1", **python}
        yield running


@contextlib.contextmanager
def fast_python(root: Path) -> Iterator[dict[str, str]]:
    """Variables by which the scripts and torchrun start `fast_python` for Python."""
    program, server = root / "python", root / "python.socket"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -S -E {_SERVER} "$@"\n')
    program.chmod(0o755)
    here = {**os.environ, "PYTHONPATH": str(ROOT)}
    with (root / "python.log").open("wb") as log:
        serving = subprocess.Popen([sys.executable, _SERVER, "--serve", server], env=here, stdout=log, stderr=log)
    try:
        Cluster.until(server.exists, f"the server of {program}", 300)
        yield {"PYTHON": str(program), "PYTHON_EXEC": str(program), SOCKET: str(server)}
    finally:
        serving.kill()
        serving.wait()


@pytest.fixture(scope="session")
def workplace(cluster, tmp_path_factory):
    """A folder with a tiny model (hf) that reads RULER's prompts, its checkpoint and a corpus."""
    root = tmp_path_factory.mktemp("workplace")
    tiny_reader(root / "hf")
    python = [cluster.environment["PYTHON"], "tools/convert_checkpoint.py", "import", "--hf", root / "hf"]
    subprocess.run([*python, "--output", root / "checkpoint"], cwd=ROOT, env=cluster.environment, check=True)
    write_corpus(root / "random")
    return root


@pytest.fixture(scope="session")
def arguments(workplace):
    """A file of flags for a run of N steps that saves every fifth; `pipeline`: without what a pipeline gives itself."""

    def write(steps: int, pipeline: bool = False) -> Path:
        words = run_arguments(workplace / "checkpoint", workplace / "random", steps)
        words += ["--save-interval", "5"]
        if pipeline:
            place = words.index("--pretrained-checkpoint")
            del words[place : place + 2]
        path = workplace / f"args-{steps}{'-pipeline' * pipeline}.txt"
        path.write_text("# a run of the tests\n" + "\n".join(words) + "\n")
        return path

    return write
