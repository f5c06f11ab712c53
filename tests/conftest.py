"""What every test gets: one thread per process, and a reason where a test cannot run."""

from __future__ import annotations

import os

# The suite starts many local ranks on few cores; the variable reaches them, set_num_threads reaches this process.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-slow", action="store_true", help="also run the tests marked slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    no_gpu = pytest.mark.skip(reason="needs a GPU: torch.cuda.is_available() is False")
    not_asked = pytest.mark.skip(reason="slow: runs with --run-slow")
    has_gpu = torch.cuda.is_available()
    for item in items:
        if item.get_closest_marker("gpu") and not has_gpu:
            item.add_marker(no_gpu)
        if item.get_closest_marker("slow") and not config.getoption("--run-slow"):
            item.add_marker(not_asked)


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory):
    """The real model, fetched as a user would."""
    from megatron_rpsd.data.smollm2 import fetch

    folder = tmp_path_factory.mktemp("models") / "smollm2"
    fetch(folder)
    return folder
