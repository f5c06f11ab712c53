#!/usr/bin/env python
"""What the scripts here know of a pipeline (import, train, export, evaluate): its settings, checks, jobs and states.

pipeline.py plan RUN SETTINGS      check every step; print `job` and its words for each that is to be queued
pipeline.py queued RUN NAME=JOB... write RUN/pipeline.json
pipeline.py end RUN --code C       write there how each step ended; exit 1 where one failed. C: of the report
pipeline.py result RUN             print that, and exit alike
pipeline.py convert --ranks N -- WORDS OF tools/convert_checkpoint.py     check them alone
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_rpsd.data.files import write_json
from megatron_rpsd.runs.attempts import last_words
from megatron_rpsd.runs.folder import RunFolder
from megatron_rpsd.training.errors import one_line_errors, quiet_parser
from megatron_rpsd.training.main import choose_device

STEPS = ("import", "train", "export", "evaluate")


def output_of(run: Path, step: str) -> Path:
    """What is there when a step is done."""
    names = {"import": "imported", "train": RunFolder(run).finished.name, "export": "exported"}
    return run / names.get(step, "ruler/report.html")


def state_of(run: Path) -> dict:
    """RUN/pipeline.json."""
    path = run / "pipeline.json"
    if not path.is_file():
        raise ValueError(f"{path} does not exist: queue the pipeline with slurm/pipeline.sh {run} SETTINGS")
    return json.loads(path.read_bytes())


def queued(run: Path, jobs: list[str]) -> None:
    """Write down the jobs; a step without one was done before."""
    numbers = dict(job.split("=") for job in jobs)
    steps = []
    for name in STEPS:
        log = "ruler/parts" if name == "evaluate" else f"logs/{name}-{numbers.get(name)}.log"
        state = {"state": "queued", "job": int(numbers[name]), "log": str(run / log)} if name in numbers else {}
        steps.append({"name": name, "state": "done", "job": None, "log": None, **state})
    report, last = str(output_of(run, "evaluate")), int(numbers["report"])
    write_json(
        run / "pipeline.json",
        {"state": "queued", "reason": None, "report": report, "last_job": last, "steps": steps},
    )


def end(run: Path, code: int) -> int:
    """The last job's: what every step left, and with it the pipeline's state."""
    pipeline, reason = state_of(run), None
    for step in pipeline["steps"]:
        done = step["job"] is None or output_of(run, step["name"]).exists()
        if step["name"] == "evaluate":
            done = code == 0
            step["log"] = str(run / "logs" / f"report-{pipeline['last_job']}.log")
        if reason is not None:
            step["state"] = "cancelled"
        elif done:
            step["state"] = "done"
        else:
            step["state"] = "failed"
            reason = f"{step['name']}: {last_words(Path(step['log']))}"
    pipeline |= {"state": "finished" if reason is None else "failed", "reason": reason}
    write_json(run / "pipeline.json", pipeline)
    return result(run)


def result(run: Path) -> int:
    """Print the pipeline's state in one line; 0 where it finished."""
    pipeline = state_of(run)
    said = {
        "finished": f"finished: {pipeline['report']}",
        "failed": f"failed: {pipeline['reason']}",
        "queued": f"failed: job {pipeline['last_job']} left the queue without a word; was it cancelled?",
    }
    print(said[pipeline["state"]], flush=True)
    return int(pipeline["state"] != "finished")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    plan = commands.add_parser("plan")
    plan.add_argument("run", type=Path)
    plan.add_argument("settings", type=Path)
    for name in ("queued", "end", "result"):
        commands.add_parser(name).add_argument("run", type=Path)
    commands.choices["queued"].add_argument("jobs", nargs="+")
    commands.choices["end"].add_argument("--code", type=int, required=True)
    convert = commands.add_parser("convert")
    convert.add_argument("--ranks", type=int, required=True)
    convert.add_argument("words", nargs=argparse.REMAINDER)
    for one in (parser, *commands.choices.values()):
        quiet_parser(one)
    args = parser.parse_args()
    with one_line_errors():
        if args.command == "queued":
            queued(args.run, args.jobs)
        elif args.command == "end":
            return end(args.run, args.code)
        elif args.command == "result":
            return result(args.run)
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
            choose_device(["--device", "cpu", "--force-cpu-runtime"])  # before Megatron is imported
            from checks import check_conversion, plan_of_jobs

            if args.command == "convert":
                words = args.words[1:] if args.words[:1] == ["--"] else args.words
                check_conversion(words, args.ranks)
            else:
                for words in plan_of_jobs(args.run, args.settings):
                    print("job", shlex.join(words))
    return 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
