"""What the user sees: numbered stages with times, the commands, a bar while training, one line when something fails."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from examples.quickstart.settings import threads_per_rank
from megatron_rpsd.data.files import held

ROOT = Path(__file__).resolve().parents[2]

_ITERATION = re.compile(r"iteration +(\d+)/ *(\d+) \|.*?lm loss: ([^ ]+) \|(?: view kl: ([^ ]+) \|)?")


class StageFailed(Exception):
    """A stage ended badly; the message is the one line for the user."""


class Stages:
    """Numbers and times the stages.

    Attributes:
        seconds: of the stages that did their work, by title.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.number = 0
        self.started = time.perf_counter()
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def stage(self, title: str, done: bool = False) -> Iterator[bool]:
        """Announce the next stage; yields whether there is something to do. `done`: its output is there, complete."""
        self.number += 1
        elapsed = time.perf_counter() - self.started
        print(f"\n[{self.number}/{self.count}] {clock(elapsed)}  {title}{': done before' if done else ''}", flush=True)
        begun = time.perf_counter()
        yield not done
        if not done:
            self.seconds[title] = time.perf_counter() - begun
            print(f"      {self.seconds[title]:.1f} s", flush=True)


def clock(seconds: float) -> str:
    """Minutes and seconds as m:ss."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def child_environment(processes: int) -> dict[str, str]:
    """The environment of a stage: this library importable, cores shared, and no GPU, as the CPU is what is shown."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    threads = str(threads_per_rank(processes))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": threads, "CUDA_VISIBLE_DEVICES": ""}


def python_name() -> str:
    """This interpreter, as a user would type it from here."""
    short = os.path.relpath(sys.executable)
    return short if not short.startswith("..") else sys.executable


def tool(name: str) -> str:
    """Path of a command line under tools/, as short as it can be written from here."""
    return min(os.path.relpath(ROOT / "tools" / name), str(ROOT / "tools" / name), key=len)


def run_command(command: Sequence[str], log: Path, processes: int = 1, show: bool = True) -> None:
    """Run a command line, print it first, keep its output in `log` and show its last line.

    Args:
        command: arguments after the interpreter.
        processes: among how many the cores are divided.
        show: print the command's last line of output.

    Raises:
        StageFailed: it ended with another code than 0.
    """
    print(f"      $ {command_line(command, processes)}", flush=True)
    last = ""
    with contextlib.closing(_output_lines(command, log, processes)) as lines:
        for line in lines:
            last = line.strip() or last
    if show and last:
        print(f"      {last}", flush=True)


def run_training(command: Sequence[str], log: Path, processes: int, steps: int) -> None:
    """The same for a training run: a bar over the `iteration N/M` lines of Megatron's log."""
    print(f"      $ {command_line(command, processes)}", flush=True)
    shown = "{desc}{bar:24} step {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
    with (
        tqdm(total=steps, desc="      ", mininterval=1.0, dynamic_ncols=sys.stderr.isatty(), bar_format=shown) as bar,
        contextlib.closing(_output_lines(command, log, processes)) as lines,
    ):
        bar.refresh()
        for line in lines:
            logged = _ITERATION.search(line)
            if logged:
                step, _, loss, kl = logged.groups()
                bar.set_postfix_str(f"lm loss {float(loss):.3f}" + (f", view KL {float(kl):.3f}" if kl else ""))
                bar.update(int(step) - bar.n)


def command_line(command: Sequence[str], processes: int = 1) -> str:
    """The command as a user can type it."""
    threads = f"OMP_NUM_THREADS={threads_per_rank(processes)} " if processes > 1 else ""
    return threads + shlex.join([python_name(), *command])


def _output_lines(command: Sequence[str], log: Path, processes: int) -> Generator[str]:
    log.parent.mkdir(parents=True, exist_ok=True)
    lines: list[str] = []
    with log.open("a") as file:
        process = subprocess.Popen(
            [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            text=True, errors="replace", env=child_environment(processes), start_new_session=True, close_fds=False,
        )  # fmt: skip
        try:
            for line in process.stdout:
                file.write(line)
                file.flush()
                lines.append(line)
                yield line
            process.wait()
        finally:
            _end(process)
    if process.returncode != 0:
        raise StageFailed(f"{failure_reason(lines, process.returncode)} (full log: {log})")


def _end(process: subprocess.Popen) -> None:
    """End a command that is still running. torchrun ends its ranks on SIGTERM, and may take half a minute for it."""
    for number, patience in ((signal.SIGTERM, 45), (signal.SIGKILL, 5)):
        if process.poll() is not None:
            return
        os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)


def failure_reason(lines: Sequence[str], code: int) -> str:
    """What a failed command says about the cause: our own `error: ...`, a rank that was killed, an exception."""
    stripped = [line.strip() for line in lines]
    for line in stripped:
        if line.startswith("error: "):
            return line.removeprefix("error: ")
    # When a rank is killed, the others' exceptions are about the lost connection.
    if any("Signal 9 (SIGKILL)" in line for line in stripped):
        return "a process was killed (SIGKILL), most likely because memory ran out"
    for line in stripped:
        found = re.search(r"((?:\w+\.)*\w*(?:Error|Exception): .*)", line)
        if found and "ChildFailedError" not in line:
            return found.group(1)
    said = next((line for line in reversed(stripped) if line), "it said nothing")
    return f"exit code {code}: {said}"


def terminate_as_interrupt() -> None:
    """Treat SIGTERM like Ctrl-C, so that a stage's processes end with this one."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)


@contextlib.contextmanager
def only_run(output: Path) -> Iterator[None]:
    """Hold the output folder for this process and the commands that it starts, should they outlive it.

    Raises:
        ValueError: another process holds it.
    """
    taken = f"--output {output} is in use by another run; wait for it, or name another folder"
    with held(output, taken, with_commands=True):
        yield
