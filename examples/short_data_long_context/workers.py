"""Parts that depend on each other, on as many workers as there are cores, and what the user sees of them."""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

from examples.lab.console import Progress
from examples.quickstart.console import clock


class Stopped(Exception):
    """Another part failed, or the user interrupted: this one ends."""


@dataclass(frozen=True)
class Part:
    """One piece of work.

    Attributes:
        name: unique.
        kind: parts of a kind take about as long.
        title: for the user.
        needs: names of parts that must be done first.
        work: (records of the parts in `needs`, show) -> (record, whether something had to be done, what to say beside
            the title). `show` is to be called now and then, and raises `Stopped`.
    """

    name: str
    kind: str
    title: str
    needs: tuple[str, ...]
    work: Callable[[Mapping[str, dict], Callable[[str, float], None]], tuple[dict, bool, str]]


@dataclass
class Board(Progress):
    """Progress of parts that run side by side.

    Attributes:
        workers: how many at a time.
        running: title -> (kind, where it is, seconds that it has run).
        finished: kinds of the parts that are over.
    """

    workers: int = 1
    running: dict[str, tuple[str, str, float]] = field(default_factory=dict)
    finished: Counter = field(default_factory=Counter)

    def left(self, running_seconds: float) -> float:
        """Seconds until everything is done, were the workers never idle."""
        waiting = Counter(self.parts) - self.finished
        spent = sum(min(seconds, self.guess(kind)) for kind, _, seconds in self.running.values())
        return max(0.0, sum(self.guess(kind) * count for kind, count in waiting.items()) - spent) / self.workers

    def at(self, part: Part, text: str, seconds: float) -> None:
        """A running part says where it is."""
        self.running[part.title] = part.kind, text, seconds
        if sys.stdout.isatty():
            self.show("; ".join(title + place for title, (_, place, _) in self.running.items()), seconds)

    def over(self, part: Part, text: str, seconds: float, fresh: bool) -> None:
        """A part is done."""
        self.running.pop(part.title, None)
        self.finished[part.kind] += 1
        self.finish(part.kind, text, seconds, fresh)


def run_parts(parts: Sequence[Part], workers: int) -> dict[str, dict]:
    """Every part's record, by name; `parts` come in an order in which they could run one after the other.

    Raises:
        What the first part raised that failed; the others are ended.
    """
    board, lock, stop = Board([part.kind for part in parts], workers=workers), threading.Lock(), threading.Event()
    futures: dict[str, Future] = {}

    def run(part: Part) -> dict:
        # Earlier parts were handed out earlier, so what is waited for here is running or done.
        records = {name: futures[name].result() for name in part.needs}
        begun = time.perf_counter()

        def show(text: str, seconds: float) -> None:
            if stop.is_set():
                raise Stopped
            with lock:
                board.at(part, text, seconds)

        show("", 0.0)
        record, fresh, said = part.work(records, show)
        with lock:
            text = f"{part.title}{said}{'' if fresh else ', done before'}"
            board.over(part, text, time.perf_counter() - begun, fresh)
        return record

    with ThreadPoolExecutor(workers) as pool:
        try:
            for part in parts:
                futures[part.name] = pool.submit(run, part)
            done, _ = wait(futures.values(), return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    seconds = clock(time.perf_counter() - board.started)
    print(f"{len(parts)} parts in {seconds}", flush=True)
    return {name: future.result() for name, future in futures.items()}
