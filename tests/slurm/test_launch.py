"""slurm/functions.sh without a Slurm: which line a launch is, with containers and without."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.slurm.conftest import CONTAINER, ROOT

PLAIN = ["--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--cpu-bind=none", "--kill-on-bad-exit=1"]
# What a task of srun would run, and the words that srun was given before it.
_SRUN = """\
#!/bin/bash
while [[ "$1" == --* ]]; do echo "$1"; shift; done
SLURM_NODEID=1 exec "$@"
"""


@pytest.fixture
def launch(tmp_path: Path):
    """Calls a function of slurm/functions.sh; returns the lines that srun, wrapper and Python were started with."""
    programs = {
        "srun": _SRUN,
        "scontrol": "#!/bin/bash\nprintf '%s\\n' node1 node2\n",
        "apptainer": '#!/bin/bash\necho apptainer "$@"\n',
        "python": '#!/bin/bash\necho python "$@"\n',
    }
    for name, text in programs.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)

    def call(line: str, **variables: str) -> list[str]:
        environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "RPSD_ROOT": str(ROOT), "PYTHON": "python", **variables}
        environment |= {"SLURM_JOB_ID": "20007", "SLURM_JOB_NODELIST": "node[1-2]"}
        script = f"set -u; source {ROOT}/slurm/environment.sh; source {ROOT}/slurm/functions.sh; {line}"
        done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=True)
        return done.stdout.splitlines()

    return call


TORCHRUN = (
    "-m torch.distributed.run --nnodes=2 --node-rank=1 --nproc-per-node=4 --master-addr=node1 --master-port=20007 "
    "-m main --a two words"
)


@pytest.mark.parametrize(
    ("variables", "options", "started"),
    [
        ({}, [], "python"),
        ({"RPSD_SRUN_OPTIONS": "--container-image=/i --mount=/d"}, ["--container-image=/i", "--mount=/d"], "python"),
        ({"RPSD_WRAPPER": CONTAINER}, [], f"{CONTAINER} python"),
    ],
    ids=["plain", "pyxis", "apptainer"],
)  # fmt: skip
def test_a_launch_is_wrapped_where_it_is_asked_for(launch, variables, options, started):
    lines = launch('torchrun_nodes 2 4 -m main --a "two words"', **variables)
    assert lines == [*PLAIN, *options, f"{started} {TORCHRUN}"]
    lines = launch("alone tools/evaluate.py --part 1", **variables)
    assert lines == ["--nodes=1", "--ntasks=1", "--cpu-bind=none", *options, f"{started} tools/evaluate.py --part 1"]
    assert launch("on_this_host tools/attempt.py begin", **variables) == [f"{started} tools/attempt.py begin"]


def test_checks_outside_of_a_container_take_their_own_python(launch):
    assert launch("on_this_host x", PYTHON="inside", RPSD_HOST_PYTHON="python") == ["python x"]
