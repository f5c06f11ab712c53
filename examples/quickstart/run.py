"""The quickstart: adapt a real model with RPSD on this machine's CPU, and report what it changed.

python -m examples.quickstart.run --output runs/demo

Fetches SmolLM2-135M, prepares Python's standard library as text, trains with RPSD and, for comparison, without, and
writes OUTPUT/report.html and OUTPUT/results.json. Run it again after an interruption: it goes on with what is missing.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import multiprocessing
import os
import platform
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
from tqdm import tqdm

from examples.quickstart.console import (
    StageFailed,
    Stages,
    child_environment,
    clock,
    command_line,
    only_run,
    run_command,
    run_training,
    terminate_as_interrupt,
    tool,
)
from examples.quickstart.report import NAMES, build_page, summary_lines
from examples.quickstart.results import Probed, missing_effect, summarise
from examples.quickstart.settings import ARMS, Paths, Settings, prepare_output, remove
from examples.quickstart.text import held_out_windows, save_windows, split_sources, write_training_text
from megatron_rpsd.data.files import replace_file, write_json
from megatron_rpsd.evaluation.logits import compare_logits, megatron_logits, transformers_logits
from megatron_rpsd.evaluation.windows import probe_windows
from megatron_rpsd.positions import skip_view
from megatron_rpsd.report.metrics import Series, read_scalars
from megatron_rpsd.training.errors import fail, one_line_errors, quiet_parser

RANKS = 2
SCALARS = {"rpsd": ("lm loss", "view kl", "iteration-time"), "standard": ("lm loss", "iteration-time")}


class Quickstart:
    """The stages, each skipped when its output is there."""

    def __init__(self, paths: Paths, settings: Settings) -> None:
        self.paths = paths
        self.settings = settings
        self.stages = Stages(9)

    def fetch_command(self) -> list[str]:
        return [tool("fetch_smollm2.py"), "--output", str(self.paths.model)]

    def preprocess_command(self) -> list[str]:
        return [
            tool("preprocess_data.py"), "--input", str(self.paths.train_text), "--tokenizer", str(self.paths.model),
            "--output-prefix", str(self.paths.train), "--seq-length", str(self.settings.seq_length),
            "--workers", str(RANKS),
        ]  # fmt: skip

    def import_command(self) -> list[str]:
        return [
            tool("convert_checkpoint.py"),
            "import",
            "--hf",
            str(self.paths.model),
            "--output",
            str(self.paths.imported),
        ]

    def train_command(self, arm: str) -> list[str]:
        settings, folder = self.settings, str(self.paths.checkpoint(arm))
        flags = {
            "--objective": arm,
            **({"--rpsd-perturbation": "skip"} if arm == "rpsd" else {}),
            "--rpsd-split-granule": settings.split_granule,
            "--pretrained-checkpoint": self.paths.imported,
            "--load": folder,
            "--save": folder,
            "--save-interval": settings.steps // 2,
            "--ckpt-format": "torch_dist",
            "--data-path": self.paths.train,
            "--data-cache-path": self.paths.cache,
            "--split": "100,0,0",
            "--seq-length": settings.seq_length,
            "--micro-batch-size": settings.global_batch_size // RANKS,
            "--global-batch-size": settings.global_batch_size,
            "--train-iters": settings.steps,
            "--seed": settings.seed,
            "--lr": settings.learning_rate,
            "--min-lr": f"{settings.learning_rate / 10:g}",
            "--lr-decay-style": "cosine",
            "--lr-warmup-iters": settings.warmup_steps,
            "--weight-decay": 0.0,
            "--adam-beta2": 0.95,
            "--clip-grad": 1.0,
            "--eval-iters": 0,
            "--eval-interval": settings.steps,
            "--log-interval": 1,
            "--num-workers": 0,
            "--tensorboard-dir": self.paths.tensorboard(arm),
        }
        return [
            "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS),
            "-m", "megatron_rpsd.training.main", "--device", "cpu", "--use-checkpoint-args",
            "--use-distributed-optimizer", "--log-timers-to-tensorboard",
            *(str(word) for pair in flags.items() for word in pair),
        ]  # fmt: skip

    def export_command(self, arm: str) -> list[str]:
        return [
            tool("convert_checkpoint.py"), "export", "--checkpoint", str(self.paths.checkpoint(arm)),
            "--hf-reference", str(self.paths.model), "--output", str(self.paths.exported(arm)),
        ]  # fmt: skip

    def verify_command(self) -> list[str]:
        return [
            tool("convert_checkpoint.py"), "verify", "--hf", str(self.paths.exported("rpsd")),
            "--checkpoint", str(self.paths.checkpoint("rpsd")),
        ]  # fmt: skip

    def fetch(self) -> None:
        with self.stages.stage("fetch SmolLM2-135M-Instruct"):
            run_command(self.fetch_command(), self.paths.log("fetch"))

    def prepare_data(self) -> None:
        paths, settings = self.paths, self.settings
        done = paths.train.with_suffix(".json").exists() and paths.windows.exists()
        with self.stages.stage("data: Python's standard library, split by document", done) as needed:
            if not needed:
                return
            train, held_out = split_sources(settings.held_out_fraction)
            write_training_text(train, paths.train_text)
            windows, names = held_out_windows(
                held_out, paths.model, settings.windows, settings.seq_length + 1, settings.window_offset
            )
            print(f"      {len(train)} documents to train on, {len(held_out)} held out; windows of {', '.join(names)}")
            run_command(self.preprocess_command(), paths.log("preprocess"), processes=RANKS)
            save_windows(paths.windows, windows)

    def import_model(self) -> None:
        with self.stages.stage("import to a Megatron checkpoint", self.paths.imported.exists()) as needed:
            if needed:
                run_command(self.import_command(), self.paths.log("import"))

    def probe(self, name: str, model: Path) -> None:
        """Sensitivity of a model to position, on the held-out windows."""
        if self.paths.probe(name).exists():
            return
        windows, settings = np.load(self.paths.windows), self.settings
        views = [skip_view(settings.split, shift, settings.seq_length) for shift in settings.shifts]
        os.environ.update(child_environment(RANKS))
        results = []
        for result in tqdm(
            probe_windows(str(model), windows, views, RANKS), total=len(windows), unit="window", desc="      ",
            bar_format="{desc}{bar:24} window {n_fmt}/{total_fmt} [{elapsed}<{remaining}]",
        ):  # fmt: skip
            results.append(result)
        probed = {
            "clm": [result[0].clm_loss for result in results],
            "kl": [[view.kl_loss for view in result] for result in results],
        }
        write_json(self.paths.probe(name), probed)
        clm, kl = np.mean(probed["clm"]), np.mean(probed["kl"], axis=0)
        print(f"      {NAMES[name]}: CLM loss {clm:.4f}; view KL " + ", ".join(
            f"{value:.4f} at shift {shift}" for shift, value in zip(settings.shifts, kl, strict=True)
        ), flush=True)  # fmt: skip

    def probe_before(self) -> None:
        title = f"position probe before: {self.settings.windows} held-out windows, {len(self.settings.shifts)} shifts"
        with self.stages.stage(title, self.paths.probe("before").exists()) as needed:
            if needed:
                self.probe("before", self.paths.model)

    def train(self, arm: str, title: str) -> None:
        steps = self.settings.steps
        with self.stages.stage(title, self._trained(arm) or self.paths.exported(arm).exists()) as needed:
            if needed:
                run_training(self.train_command(arm), self.paths.log(f"train_{arm}"), RANKS, steps)
                if not self._trained(arm):
                    raise StageFailed(f"no checkpoint of step {steps} (full log: {self.paths.log(f'train_{arm}')})")
            self._remove_intermediate(arm)

    def probe_after(self) -> None:
        done = all(self.paths.probe(arm).exists() and self.paths.exported(arm).exists() for arm in ARMS)
        with self.stages.stage("export to Hugging Face folders, position probe after", done) as needed:
            for arm in ARMS if needed else ():
                if not self.paths.exported(arm).exists():
                    run_command(self.export_command(arm), self.paths.log(f"export_{arm}"))
                self.probe(arm, self.paths.exported(arm))
            self._remove_intermediate("standard")

    def check(self) -> None:
        """The export against the checkpoint, tensor by tensor, and transformers' logits against Megatron's."""
        paths = self.paths
        with self.stages.stage("check the exported RPSD model", paths.check.exists()) as needed:
            if not needed:
                return
            run_command(self.verify_command(), paths.log("verify"))
            said = paths.log("verify").read_text().strip().splitlines()[-1]
            tokens = np.load(paths.windows)[0, :-1]
            # A process of its own: the CPU runtime must not reach transformers' model here.
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                ours = pool.submit(megatron_logits, str(paths.checkpoint("rpsd")), str(paths.model), tokens).result()
            compared = compare_logits(ours, transformers_logits(paths.exported("rpsd"), tokens))
            print(
                f"      transformers against Megatron: logits differ by at most {compared.max_difference:.1e}, "
                f"the same token first at {100 * compared.agreement:.1f} % of {len(tokens)} positions",
                flush=True,
            )
            if not compared.max_difference <= 1e-3 * compared.largest_logit:
                raise StageFailed(
                    f"transformers' logits of the export differ from Megatron's by {compared.max_difference:.2e}, at a "
                    f"largest logit of {compared.largest_logit:.1f}: the export is not the trained model"
                )
            write_json(paths.check, {"verify": said, **dataclasses.asdict(compared)})

    def report(self) -> dict:
        with self.stages.stage("report"):
            # Earlier runs' stages keep their times, so that a resumed run reports them too.
            earlier = json.loads(self.paths.timings.read_text()) if self.paths.timings.exists() else {}
            results, curves = self.results({**earlier, **self.stages.seconds})
            write_json(self.paths.output / "results.json", results)
            replace_file(self.paths.output / "report.html", build_page(results, curves).encode())
        return results

    def results(self, seconds: dict[str, float]) -> tuple[dict, dict[str, dict[str, Series]]]:
        """What results.json holds, and the curves beside it."""
        paths, settings = self.paths, self.settings
        probes = {name: Probed.from_json(json.loads(paths.probe(name).read_text())) for name in NAMES}
        curves = {arm: read_scalars(paths.tensorboard(arm), SCALARS[arm]) for arm in ARMS}
        summary = summarise(probes["before"], probes["standard"], probes["rpsd"], settings.shifts)
        commands = [self.fetch_command(), self.preprocess_command(), self.import_command()]
        commands = [command_line(command) for command in commands]
        commands += [command_line(self.train_command(arm), RANKS) for arm in ARMS]
        commands += [command_line(command) for command in [*map(self.export_command, ARMS), self.verify_command()]]
        packages = ("megatron-core", "torch", "transformers", "numpy")
        results = {
            "summary": summary,
            "missing_effect": missing_effect(summary),
            "cost": {
                arm: {
                    "seconds_per_step": statistics.median(curves[arm]["iteration-time"].values),
                    "steps": settings.steps,
                }
                for arm in ARMS
            },
            "check": json.loads(paths.check.read_text()),
            "settings": {**dataclasses.asdict(settings), "split": settings.split},
            "curves": {arm: {tag: dataclasses.asdict(series) for tag, series in curves[arm].items()} for arm in ARMS},
            "commands": commands,
            "seconds": seconds,
            "versions": {
                "Python": platform.python_version(),
                **{name: importlib.metadata.version(name) for name in packages},
            },
        }
        return results, curves

    def _remove_intermediate(self, arm: str) -> None:
        """Remove what is no longer needed: checkpoints before the last, and the control once it is exported."""
        folder, last = self.paths.checkpoint(arm), f"iter_{self.settings.steps:07d}"
        exported = arm == "standard" and self.paths.exported(arm).exists()
        trained = (folder / last).exists() and self._trained(arm)
        stale = [path for path in sorted(folder.glob("iter_*")) if path.name != last] if trained else []
        for path in [folder] if exported and folder.exists() else stale:
            print(f"      removing {path}: an intermediate checkpoint with its optimizer state", flush=True)
            remove(path)

    def _trained(self, arm: str) -> bool:
        tracker = self.paths.checkpoint(arm) / "latest_checkpointed_iteration.txt"
        return tracker.exists() and tracker.read_text().strip() == str(self.settings.steps)

    def run(self) -> dict:
        """All stages; returns the results."""
        steps = self.settings.steps
        try:
            self.fetch()
            self.prepare_data()
            self.import_model()
            self.probe_before()
            self.train("rpsd", f"RPSD: {steps} steps on {RANKS} CPU ranks, data parallel")
            self.train("standard", "control: the same steps and windows, CLM alone")
            self.probe_after()
            self.check()
            return self.report()
        except StageFailed as failed:
            fail(f"stage {self.stages.number} of {self.stages.count} failed: {failed}")
        except BrokenProcessPool:
            where = f"stage {self.stages.number} of {self.stages.count}"
            fail(f"{where} failed: a worker process was killed (did memory run out?); run the same command again")
        except KeyboardInterrupt:
            print("\ninterrupted; the same command goes on from here", file=sys.stderr)
            raise SystemExit(130) from None
        finally:
            earlier = json.loads(self.paths.timings.read_text()) if self.paths.timings.exists() else {}
            write_json(self.paths.timings, {**earlier, **self.stages.seconds})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, default=Path("runs/demo"), help="Folder for everything (default: runs/demo)."
    )
    args = quiet_parser(parser).parse_args()
    terminate_as_interrupt()
    paths, settings = Paths(args.output), Settings()
    with one_line_errors(), only_run(paths.output):
        if not prepare_output(paths, settings):
            print(f"{paths.output} was made with other settings, or elsewhere: all but the model is made again")
        quickstart = Quickstart(paths, settings)
        results = quickstart.run()
    print(f"\nDone in {clock(sum(quickstart.stages.seconds.values()))}.\n")
    print("\n".join(summary_lines(results["summary"])))
    print(f"\nReport: {paths.output / 'report.html'}   adapted model: {paths.exported('rpsd')}")
    if results["missing_effect"]:
        print(f"error: {results['missing_effect']}", file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    main()
