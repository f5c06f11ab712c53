#!/usr/bin/env python
"""The long reliability counts: every test marked slow, and a table of what was tried and what held.

python tools/run_soak.py --output runs/soak
python tools/run_soak.py --output runs/soak tests/soak --match "kills or damaged"
"""

import argparse
import subprocess
import sys
import xml.etree.ElementTree as xml
from pathlib import Path

from megatron_rpsd.data.files import write_json
from megatron_rpsd.training.errors import one_line_errors, quiet_parser


def _rows(report: Path) -> list[dict]:
    """One row a test: what it counted (its `tried` and `held` properties; 1 for a test that does not count)."""
    rows = []
    for case in xml.parse(report).iter("testcase"):
        counts = {item.get("name"): int(item.get("value")) for item in case.iter("property")}
        failed = case.find("failure") is not None or case.find("error") is not None
        tried = counts.get("tried", 1)
        held = counts.get("held", 0 if failed else tried)
        skipped = case.find("skipped")
        rows.append({
            "test": f"{case.get('classname')}.{case.get('name')}", "tried": 0 if skipped is not None else tried,
            "held": 0 if skipped is not None else held, "seconds": float(case.get("time")),
            "failed": failed, "skipped": None if skipped is None else skipped.get("message"),
        })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="Folder for results.json and pytest's own report.")
    parser.add_argument("tests", nargs="*", default=["tests"], help="Files or folders. Default: all.")
    parser.add_argument("--match", default="", metavar="WORDS", help="Those tests alone, as pytest's -k.")
    args = quiet_parser(parser).parse_args()
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    report = output / "pytest.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-m", "slow", "--run-slow", "-v", f"--junitxml={report}", *args.tests]
    command += ["-k", args.match] if args.match else []
    with one_line_errors():
        code = subprocess.run(command).returncode
        if not report.exists():
            raise ValueError(f"pytest ended with code {code} and no report; its message stands above")
    rows = _rows(report)
    print("| test | tried | held | seconds | skipped |\n|---|---|---|---|---|")
    for row in rows:
        print(f"| {row['test']} | {row['tried']} | {row['held']} | {row['seconds']:.0f} | {row['skipped'] or ''}")
    write_json(output / "results.json", rows)
    if code:
        print(f"{sum(row['failed'] for row in rows)} of {len(rows)} long tests failed", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    sys.exit(main())
