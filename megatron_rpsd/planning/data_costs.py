"""Measured speed and memory of preparing data, beside the tokenizer's own batch encoding of the same texts.

The peer is `encode_batch_fast` of the tokenizers library with as many threads as ours has workers, on texts that lie in
memory: it reads, checks, writes and sorts nothing. Both run in processes of their own, in turn; a repetition gives a
ratio, by the clock and by processor seconds, and the median of the ratios is reported. Imports and loading the
tokenizer count for neither, and are reported beside them; starting the workers counts for ours.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from megatron_rpsd.data.documents import python_sources

# Each program prints JSON: seconds and processor seconds of the work, seconds before it, peak memory, tokens.
_COMMON = """
import concurrent.futures, json, multiprocessing, resource, sys, time
began = time.perf_counter()
def spent():
    every = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(use.ru_utime + use.ru_stime for use in every)
def done(started, processor, tokens):
    now = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": now - started, "cpu_seconds": spent() - processor, "before": started - began,
                      "peak_bytes": peak, "tokens": tokens}))
"""
_OURS = (
    _COMMON
    + """
if __name__ == "__main__":
    from pathlib import Path
    from megatron_rpsd.data import preprocess
    text, tokenizer, workers, output, repeat = sys.argv[1:]
    # In a process of its own: the import of transformers would hide what the work itself takes.
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        spec = pool.submit(preprocess.load_tokenizer, tokenizer, True, "concatenate", None).result()
    preprocess.load_tokenizer = lambda *_: spec
    inputs = [Path(text)] * int(repeat)
    config = preprocess.PreprocessConfig(inputs, tokenizer, Path(output), 4096, workers=int(workers))
    started, processor = time.perf_counter(), spent()
    done(started, processor, preprocess.preprocess(config).tokens)
"""
)
_PEER = (
    _COMMON
    + """
from tokenizers import Tokenizer
texts = [json.loads(line)["text"] for line in open(sys.argv[1])]
tokenizer = Tokenizer.from_file(sys.argv[2] + "/tokenizer.json")
tokenizer.no_truncation()
tokenizer.no_padding()
tokenizer.encode_batch_fast(["warm up"] * 8)
started, processor, tokens = time.perf_counter(), spent(), 0
for first in range(0, len(texts), 1024):
    tokens += sum(len(encoding) + 1 for encoding in tokenizer.encode_batch_fast(texts[first : first + 1024]))
done(started, processor, tokens)
"""
)


def write_corpus(path: Path, megabytes: float) -> None:
    """The standard library's sources as JSONL documents of one file each, again and again up to a size."""
    sources, size = python_sources(), 0
    with path.open("w") as file:
        for number in range(10**9):
            if size >= megabytes * 1e6:
                return
            text = sources[number % len(sources)].read_text(encoding="utf-8")
            size += file.write(json.dumps({"text": text}) + "\n")


def _run(program: Path, arguments: list, workers: int) -> dict:
    root = Path(__file__).resolve().parents[2]
    paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    threads = {"RAYON_NUM_THREADS": str(workers), "TOKENIZERS_PARALLELISM": "true", "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **threads, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, str(program), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    if result.returncode:
        raise ValueError(f"the measured program failed: {(result.stderr.strip().splitlines() or ['?'])[-1]}")
    return json.loads(result.stdout.splitlines()[-1])


def measure_preparation(
    tokenizer: Path, megabytes: float, workers: int, repetitions: int, progress: Callable[[str], None]
) -> dict:
    """Ours and the peer in turn; then ours on a quarter of the input, and on eight times that.

    Returns:
        throughput_ratio, cpu_ratio: medians over repetitions of ours over the peer's tokens per (processor) second;
        seconds: medians, of ours and of encode_batch; the single measurements;
        peak_bytes of the process at 1 and 8 times a quarter of the input.
    """
    rows = {"ours": [], "peer": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text, quarter = folder / "corpus.jsonl", folder / "quarter.jsonl"
        write_corpus(text, megabytes)
        write_corpus(quarter, megabytes / 4)
        for way, source in (("ours", _OURS), ("peer", _PEER)):
            (folder / f"{way}.py").write_text(source)
        for repetition in range(repetitions):
            order = ("ours", "peer") if repetition % 2 == 0 else ("peer", "ours")
            for way in order:
                arguments = [text, tokenizer] + ([workers, folder / "out", 1] if way == "ours" else [])
                row = _run(folder / f"{way}.py", arguments, workers)
                rows[way].append(row)
                progress(f"{way}: {row['tokens'] / row['seconds']:.0f} tokens a second, {row['cpu_seconds']:.1f} s CPU")
            assert rows["ours"][-1]["tokens"] == rows["peer"][-1]["tokens"], "the two made different tokens"
        grown = {}
        for times in (1, 8):
            grown[times] = _run(folder / "ours.py", [quarter, tokenizer, workers, folder / "out", times], workers)
            progress(f"{times} times {megabytes / 4:g} MB: peak {grown[times]['peak_bytes'] / 2**20:.0f} MiB")
    pairs = list(zip(rows["ours"], rows["peer"], strict=True))
    return {
        "throughput_ratio": statistics.median(peer["seconds"] / ours["seconds"] for ours, peer in pairs),
        "cpu_ratio": statistics.median(peer["cpu_seconds"] / ours["cpu_seconds"] for ours, peer in pairs),
        "seconds": {
            name: statistics.median(row["seconds"] for row in rows[way])
            for name, way in (("ours", "ours"), ("encode_batch", "peer"))
        },
        "tokens_per_s": {way: statistics.median(row["tokens"] / row["seconds"] for row in rows[way]) for way in rows},
        "peak_bytes": {f"{times}x": row["peak_bytes"] for times, row in grown.items()},
        "rows": {**rows, "grown": list(grown.values())},
        "workers": workers,
        "megabytes": megabytes,
        "device": f"cpu, {os.cpu_count()} cores",
    }
