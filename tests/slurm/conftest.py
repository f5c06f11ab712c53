"""One cluster for all tests of this folder, and what a run on it needs."""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

import pytest

from megatron_rpsd.checkpoint.convert import import_hf
from tests.distributed.corpus import run_arguments, write_corpus
from tests.distributed.models import tiny_model
from tests.distributed.pool import RankPool
from tests.slurm.cluster import Cluster, missing

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def cluster():
    """Two nodes; skipped, with the reason, where Slurm is absent."""
    reason = missing()
    if reason:
        pytest.skip(reason)
    root = Path(tempfile.mkdtemp(prefix="slurm"))  # short: a socket's path may have 107 characters
    try:
        with Cluster(root) as running:
            running.environment |= {"RPSD_ROOT": str(ROOT), "PYTHON": sys.executable, "RPSD_RANKS_PER_NODE": "1"}
            yield running
    finally:
        shutil.rmtree(root)


@pytest.fixture(scope="session")
def workplace(tmp_path_factory):
    """A folder with a tiny model (hf), its checkpoint and a corpus."""
    root = tmp_path_factory.mktemp("workplace")
    tiny_model(root / "hf", "llama")
    RankPool().run(1, import_hf, root / "hf", root / "checkpoint")
    write_corpus(root / "random")
    return root


@pytest.fixture(scope="session")
def arguments(workplace):
    """A file of flags for a run of N steps."""

    def write(steps: int, *more: str) -> Path:
        words = [*run_arguments(workplace / "checkpoint", workplace / "random", steps), *more]
        path = workplace / f"args-{steps}-{len(more)}.txt"
        path.write_text("# a run of the tests\n" + "\n".join(words) + "\n")
        return path

    return write
