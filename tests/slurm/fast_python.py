#!/usr/bin/env python
"""A Python that starts in a moment: each call is forked from a server that has imported torch and Megatron already.

Importing them takes ten seconds of a core, and a test of this folder starts dozens of processes. What Slurm starts and
kills is the client. It hands its words, variables, folder and standard streams to the server, and passes the child's
exit code on. Where the client dies the child is killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import signal
import socket
import sys

SOCKET = "FAST_PYTHON_SOCKET"
_PR_SET_PDEATHSIG = 1
_MORE = (
    "torch.distributed.run",
    "megatron_rpsd.evaluation.engines.transformers_engine",
    "megatron_rpsd.evaluation.ruler_parts",
    "megatron_rpsd.report.ruler_report",
    "transformers.models.llama.modeling_llama",
)


def _end_with_parent() -> None:
    """Have this process killed when its parent ends, however that ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def client() -> int:
    """Run `sys.argv[1:]` by the server; returns the exit code."""
    _end_with_parent()  # torchrun's workers are sessions of their own: where their agent is killed they have to follow
    request = {"words": sys.argv[1:], "folder": os.getcwd(), "variables": dict(os.environ)}
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(os.environ[SOCKET])
        content = json.dumps(request).encode()
        socket.send_fds(connection, [len(content).to_bytes(8, "big")], [0, 1, 2])
        connection.sendall(content)
        answer = connection.recv(1)
    return answer[0] if answer else 1


def _receive(connection: socket.socket) -> tuple[dict, list[int]]:
    size, streams, _, _ = socket.recv_fds(connection, 8, 3)
    content = b""
    while len(content) < int.from_bytes(size, "big"):
        content += connection.recv(1 << 20)
    return json.loads(content), streams


def _become(request: dict, streams: list[int]) -> int:
    """Run the words as Python would, in this process; returns the exit code."""
    import runpy
    import traceback

    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdout.reconfigure(line_buffering=True)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["variables"])
    words = [word for word in request["words"] if word != "-u"]
    try:
        if words[0] == "-m":
            sys.argv, sys.path[0] = words[1:], request["folder"]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv, sys.path[0] = words, os.path.dirname(os.path.abspath(words[0]))
            runpy.run_path(words[0], run_name="__main__")
        code = 0
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else int(left.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def _attend(connection: socket.socket) -> None:
    """In a process of its own: a child for the request, and its end where either side ends."""
    import select

    request, streams = _receive(connection)
    child = os.fork()
    if child == 0:
        connection.close()
        _end_with_parent()
        os.setsid()
        os._exit(_become(request, streams))
    for stream in streams:
        os.close(stream)
    ended = os.pidfd_open(child)
    ready, _, _ = select.select([ended, connection], [], [])
    if ended not in ready:  # nothing is sent: the client is gone
        with contextlib.suppress(ProcessLookupError):  # it has no group of its own yet, and no children
            os.killpg(child, signal.SIGKILL)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if ended in ready:
        connection.sendall(bytes([code if code >= 0 else 128 - code]))


def serve(path: str) -> None:
    """Answer clients for ever."""
    import tests.distributed.preload  # noqa: F401

    for name in _MORE:
        importlib.import_module(name)

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(64)
        while True:
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                _end_with_parent()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                try:
                    _attend(connection)
                finally:
                    os._exit(0)
            connection.close()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2])
    sys.exit(client())
