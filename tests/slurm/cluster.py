"""A real Slurm of two nodes on this machine, in a folder of its own: Debian's packages, no systemd, no cgroups.

with Cluster(folder) as cluster:
    job = cluster.sbatch("train.sbatch", "--nodes", "2")
    cluster.wait(job)
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "scontrol", "scancel", "unshare")
HOSTS = Path("/etc/hosts")
_ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}

_CONF = """\
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld_port}
AuthType=auth/munge
AuthInfo=socket={root}/munge/socket,cred_expire=5
CryptoType=crypto/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SlurmdParameters=config_overrides
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
KillWait=5
MinJobAge=86400
JobRequeue=1
GresTypes=gpu
NodeName=node1 NodeHostname=node1 NodeAddr=127.0.0.1 Port={port1} CPUs=16 RealMemory=64000 Gres=gpu:8
NodeName=node2 NodeHostname=node2 NodeAddr=127.0.0.1 Port={port2} CPUs=16 RealMemory=64000 Gres=gpu:8
PartitionName=main Nodes=node[1-2] Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    """Why no cluster can run here, or None."""
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    if absent:
        return f"Slurm is not installed: no {', '.join(absent)} (apt-get install slurmctld slurmd slurm-client munge)"
    return None if os.geteuid() == 0 else "the cluster's daemons need root"


def _free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


class Cluster:
    """Starts the daemons on entry and stops them on exit; its commands run with this cluster's configuration.

    Args:
        root: an empty folder whose path is short enough for a socket (about 80 characters).
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._daemons: list[subprocess.Popen] = []
        self._hosts = ""
        self.environment = {**os.environ, "SLURM_CONF": str(root / "slurm.conf")}

    def __enter__(self) -> Cluster:
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    def _start(self) -> None:
        self._hosts = HOSTS.read_text()
        HOSTS.write_text(self._hosts.rstrip("\n") + "\n127.0.0.1 node1\n127.0.0.1 node2\n")
        for name in ("munge", "state", "spool"):
            (self.root / name).mkdir(mode=0o755)
        ctld_port, port1, port2 = _free_ports(3)
        names = {
            "host": socket.gethostname(),
            "root": self.root,
            "ctld_port": ctld_port,
            "port1": port1,
            "port2": port2,
        }
        (self.root / "slurm.conf").write_text(_CONF.format(**names))
        # Ttys stand for GPUs: files that exist and that nobody opens.
        (self.root / "gres.conf").write_text("NodeName=node[1-2] Name=gpu File=/dev/tty[0-7]\n")
        self._start_munge()
        self._spawn(["slurmctld", "-D", "-c"], "slurmctld.out")
        for node in ("node1", "node2"):
            self._spawn(["unshare", "--uts", "sh", "-c", f"hostname {node} && exec slurmd -D -N {node}"], f"{node}.out")
        self.until(lambda: self.command("sinfo", "-h", "-N", "-o", "%T").split() == ["idle", "idle"], "nodes idle", 30)

    def _start_munge(self) -> None:
        folder = self.root / "munge"
        (folder / "key").write_bytes(os.urandom(1024))
        (folder / "key").chmod(0o600)
        paths = {"key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        options = [f"--{name}={folder / file}" for name, file in paths.items()]
        self._spawn(["munged", "-F", "--force", f"--socket={folder / 'socket'}", *options], "munged.out")
        self.until((folder / "socket").exists, "munge's socket", 10)

    def _spawn(self, command: list[str], log: str) -> None:
        with (self.root / log).open("wb") as output:
            self._daemons.append(
                subprocess.Popen(command, env=self.environment, stdout=output, stderr=output, start_new_session=True)
            )

    def stop(self) -> None:
        """Cancel all jobs, end the daemons, put /etc/hosts back."""
        if len(self._daemons) > 2:
            subprocess.run(
                ["scancel", "--full", "--user", "root"], env=self.environment, capture_output=True, timeout=30
            )
            self.until(lambda: not self.command("squeue", "-h", "-o", "%i").strip(), "the jobs' end", 30)
        for daemon in reversed(self._daemons):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(daemon.pid, signal.SIGTERM)
        for daemon in self._daemons:
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(daemon.pid, signal.SIGKILL)
        if self._hosts:
            HOSTS.write_text(self._hosts)

    def command(self, *words: object) -> str:
        """What one of Slurm's commands prints; its failure is a RuntimeError."""
        typed = [str(word) for word in words]
        done = subprocess.run(typed, env=self.environment, capture_output=True, text=True, timeout=60)
        if done.returncode:
            raise RuntimeError(f"{' '.join(typed)}: exit {done.returncode}: {done.stderr.strip()}")
        return done.stdout

    def sbatch(self, *words: object, environment: dict[str, str] | None = None) -> int:
        """Submit; returns the job's number."""
        typed = ["sbatch", "--parsable", *(str(word) for word in words)]
        done = subprocess.run(
            typed, env={**self.environment, **(environment or {})}, capture_output=True, text=True, timeout=60
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(typed)}: exit {done.returncode}: {done.stderr.strip()}")
        return int(done.stdout.split(";")[0])

    def job(self, number: int | str) -> dict[str, str]:
        """The fields of `scontrol show job`."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.command("scontrol", "show", "job", number, "--oneliner")))

    def wait(self, number: int | str, seconds: float = 180) -> dict[str, str]:
        """The job's fields once it ended, however it did."""
        self.until(lambda: self.job(number)["JobState"] in _ENDED, f"the end of job {number}", seconds)
        return self.job(number)

    @staticmethod
    def until(true, what: str, seconds: float) -> None:
        """Poll until `true()`; TimeoutError names what was waited for."""
        end = time.monotonic() + seconds
        while not true():
            if time.monotonic() > end:
                raise TimeoutError(f"{what}: not within {seconds:.0f} s")
            time.sleep(0.2)
