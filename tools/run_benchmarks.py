#!/usr/bin/env python
"""Every benchmark, one after another, and one table of them: what, ours, peer, ratio.

python tools/run_benchmarks.py --output runs/bench
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from megatron_rpsd.data.files import write_json
from megatron_rpsd.training.errors import one_line_errors, quiet_parser

COMMANDS = {
    "views_4k_vocabulary": "benchmark_views.py --seq-length 4096 --vocab-size 4096",
    "views_32k_vocabulary": "benchmark_views.py --seq-length 4096 --vocab-size 32000",
    "loss": "benchmark_loss.py --tokens 2048 --hidden 1024 --vocab 128256 --tensor-model-parallel-size 2 "
    "--repetitions 2",
    "conversion": "benchmark_conversion.py --hf runs/bench/smollm2 --fetch-smollm2",
    "ruler": "benchmark_ruler.py --tokenizer runs/bench/smollm2 --fetch-smollm2",
    "data": "benchmark_data.py --tokenizer runs/bench/smollm2 --fetch-smollm2",
}


def _rows(name: str, result: dict) -> Iterator[dict]:
    """What a benchmark's JSON says, as rows of the table."""
    if name == "loss":
        ours, bare = result["implementations"]["fused"], result["implementations"]["bare products"]
        peers = {key: row for key, row in result["implementations"].items() if key not in ("fused", "bare products")}
        for key, unit in (("seconds", "s"), ("peak_bytes", "bytes")):
            best = min(peers, key=lambda peer: peers[peer][key])
            yield {"what": f"loss, {unit}", "ours": ours[key], "peer": best, "theirs": peers[best][key]}
        yield {"what": "loss, s", "ours": ours["seconds"], "peer": "bare products", "theirs": bare["seconds"]}
        return
    if name in ("ruler", "data"):
        what, peer = {"ruler": ("RULER's prompts at 64K", "plain"), "data": ("data, 2 workers", "encode_batch")}[name]
        ours, theirs = (result["seconds"][way] for way in ("ours", peer))
        yield {"what": f"{what}, s", "ours": ours, "peer": peer, "theirs": theirs}
        return
    if name == "conversion":
        for key, unit in (("seconds", "s"), ("peak_bytes", "bytes")):
            copy = result[key]["copy"]
            for way in ("import", "export"):
                yield {"what": f"{way}, {unit}", "ours": result[key][way], "peer": "copy", "theirs": copy}
        return
    for way in ("full", "shared-prefix"):
        ours = result["step_ratio"][way] * result["seconds"]["clm"]
        yield {"what": f"{name}, {way} step, s", "ours": ours, "peer": "clm step", "theirs": result["seconds"]["clm"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="Folder of results.json, the table, and each benchmark's own.")
    parser.add_argument("--only", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    args = quiet_parser(parser).parse_args()
    output, tools = Path(args.output), Path(__file__).parent
    table, results = [], {}
    with one_line_errors():
        for number, name in enumerate(args.only, 1):
            print(f"[{number}/{len(args.only)}] {COMMANDS[name]}", flush=True)
            script, *flags = COMMANDS[name].split()
            path = output / f"{name}.json"
            command = [sys.executable, str(tools / script), *flags, "--output", str(path)]
            if subprocess.run(command).returncode:
                raise ValueError(f"{script} failed; its message stands above")
            results[name] = json.loads(path.read_text())
            table += [{**row, "ratio": row["ours"] / row["theirs"]} for row in _rows(name, results[name])]
    print(f"{'what':44s} {'ours':>14s} {'peer':20s} {'theirs':>14s} {'ratio':>7s}")
    for row in table:
        print(f"{row['what']:44s} {row['ours']:14.4g} {row['peer']:20s} {row['theirs']:14.4g} {row['ratio']:7.3f}")
    write_json(output / "results.json", {"table": table, "benchmarks": results})


if __name__ == "__main__":
    sys.exit(main())
