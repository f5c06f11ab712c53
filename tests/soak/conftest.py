"""The folder that malformed command lines are run on, and a sound command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.soak.workspace import build


@pytest.fixture(scope="session")
def workspace(tmp_path_factory) -> Path:
    """Made once; a test works on a copy."""
    return build(tmp_path_factory.mktemp("soak") / "workspace")
