"""The CPU runtime, one test a stand-in. The checks live in cpu_checks/ and run in one process of their own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

CHECKS = Path(__file__).with_name("cpu_checks")
ROOT = Path(__file__).resolve().parents[3]
# Read, not imported: the checks belong to a process with the runtime installed.
NAMES = [
    name
    for file in sorted(CHECKS.glob("*_checks.py"))
    for name in re.findall(r"^@check\ndef (\w+)", file.read_text(), re.M)
]


def run_python(*arguments: str) -> subprocess.CompletedProcess:
    """Python on a machine that shows no GPU, with this repository importable."""
    environment = dict(os.environ, CUDA_VISIBLE_DEVICES="", PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    for inherited in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHDYNAMO_DISABLE", "CUDA_DEVICE_MAX_CONNECTIONS"):
        environment.pop(inherited, None)
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, timeout=300)


@pytest.fixture(scope="module")
def results() -> dict[str, str | None]:
    held = np.ones(512 * 2**20, np.uint8)  # see the_peak_is_this_processs_own
    finished = run_python(str(CHECKS / "run.py"))
    del held
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout.splitlines()[-1])


def test_every_check_ran(results):
    assert sorted(NAMES) == sorted(results)


@pytest.mark.parametrize("name", NAMES)
def test_stand_in(name: str, results):
    assert results[name] is None, results[name]


GPU_FOUND = """
import torch
import megatron_rpsd.runtime.cpu as cpu
before = dict(vars(torch.Tensor)), torch.cuda.synchronize
torch.cuda.is_available = lambda: True
torch.cuda.get_device_name = lambda index=0: "Pretended GPU"
try:
    cpu.install_cpu_runtime()
except ValueError as error:
    print(error)
assert not cpu.cpu_runtime_installed()
assert (dict(vars(torch.Tensor)), torch.cuda.synchronize) == before, "refused, yet the process was changed"
cpu.install_cpu_runtime(force=True)
assert cpu.cpu_runtime_installed()
assert torch.zeros(1, device="cuda").device.type == "cpu" and torch.cuda.get_device_name(0) == "cpu"
"""


def test_a_machine_with_a_gpu_is_refused_unless_forced():
    finished = run_python("-c", GPU_FOUND)
    assert finished.returncode == 0, finished.stderr
    (message,) = finished.stdout.splitlines()
    for part in ("--device cpu", "Pretended GPU", "--device cuda", "--force-cpu-runtime"):
        assert part in message


NOT_INSTALLED = """
import torch
import megatron_rpsd.runtime.cpu as cpu
assert not cpu.cpu_runtime_installed()
assert not torch.cuda.is_available() and torch.zeros(1).type() == "torch.FloatTensor"
try:
    torch.zeros(1, device="cuda")
except (AssertionError, RuntimeError):
    print("not mapped")
"""


def test_importing_the_module_changes_nothing():
    finished = run_python("-c", NOT_INSTALLED)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout == "not mapped\n"
