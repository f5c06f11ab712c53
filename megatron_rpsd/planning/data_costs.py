"""Measured speed and memory of preparing data, beside the tokenizer's own batch encoding of the same texts.

The peer is `encode_batch_fast` of the tokenizers library with as many threads as ours has workers, on texts that lie in
memory: it reads, checks, writes and sorts nothing. Both run in processes of their own, in turn; a repetition gives a
ratio, by the clock and by processor seconds, and the median of the ratios is reported. Imports and loading the
tokenizer count for neither, and are reported beside them.
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
import json, resource, sys, time
began = time.perf_counter()
def spent():
    every = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(use.ru_utime + use.ru_stime for use in every)
def done(started, processor, tokens):
    now = time.perf_counter()
    peak = [resource.getrusage(who).ru_maxrss * 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    print(json.dumps({"seconds": now - started, "cpu_seconds": spent() - processor, "before": started - began,
                      "peak_bytes": peak[0], "worker_peak_bytes": peak[1], "tokens": tokens}))
"""
_OURS = (
    _COMMON
    + """
if __name__ == "__main__":
    from pathlib import Path
    from megatron_rpsd.data import preprocess
    text, tokenizer, workers, output, repeat = sys.argv[1:]
    spec = preprocess.load_tokenizer(tokenizer, True, "concatenate", None)
    preprocess.load_tokenizer = lambda *_: spec
    config = preprocess.PreprocessConfig([Path(text)] * int(repeat), tokenizer, Path(output), 4096, workers=int(workers))
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
    """Ours and the peer in turn, and ours once on eight times the input.

    Returns:
        throughput_ratio, cpu_ratio: medians over repetitions of ours over the peer's tokens per (processor) second;
        the single measurements; peak_bytes of the main process and of the largest worker at 1 and 8 times the input.
    """
    rows = {"ours": [], "peer": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text = folder / "corpus.jsonl"
        write_corpus(text, megabytes)
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
        long = _run(folder / "ours.py", [text, tokenizer, workers, folder / "out", 8], workers)
        progress(f"8 times the input: {long['tokens'] / long['seconds']:.0f} tokens a second")
    pairs = list(zip(rows["ours"], rows["peer"], strict=True))
    return {
        "throughput_ratio": statistics.median(peer["seconds"] / ours["seconds"] for ours, peer in pairs),
        "cpu_ratio": statistics.median(peer["cpu_seconds"] / ours["cpu_seconds"] for ours, peer in pairs),
        "tokens_per_s": {way: statistics.median(row["tokens"] / row["seconds"] for row in rows[way]) for way in rows},
        "peak_bytes": {"1x": rows["ours"][0]["peak_bytes"], "8x": long["peak_bytes"]},
        "worker_peak_bytes": {"1x": rows["ours"][0]["worker_peak_bytes"], "8x": long["worker_peak_bytes"]},
        "rows": {**rows, "eight_times": [long]},
        "workers": workers,
        "megabytes": megabytes,
        "device": f"cpu, {os.cpu_count()} cores",
    }
