"""The training entry on one GPU: a tiny model is imported, trained over NCCL, resumed, and exported."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import torch

from megatron_rpsd.checkpoint.convert import different_folders, different_tensors
from megatron_rpsd.checkpoint.hf_folder import HFFolder
from megatron_rpsd.checkpoint.megatron_arguments import megatron_arguments
from megatron_rpsd.planning.gpu_rows import ROOT, Row, environment, guarded
from megatron_rpsd.planning.gpu_steps import WITHOUT_TE, software_here

Runner = Callable[[str, Sequence[str]], str]
"""(`train` or `convert`, arguments) -> what it printed; ValueError where it failed."""


@dataclass(frozen=True)
class TrainingSizes:
    """A window of one block of a flash kernel: over several, its backward pass adds in an order that varies."""

    length: int = 64
    hidden: int = 256
    heads: int = 4
    layers: int = 2
    vocab_size: int = 512
    steps: int = 10
    limit_s: float = 150.0


GPU_SIZES = TrainingSizes()
TINY_SIZES = TrainingSizes(32, 32, 4, 2, 97, 4)


class Commands:
    """Runs the entry points as a user would, each in a process group of its own and for a limited time."""

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s

    def __call__(self, kind: str, words: Sequence[str]) -> str:
        launch = ["-m", "torch.distributed.run", "--nproc-per-node", "1", "--rdzv-backend", "c10d",
                  "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1"]  # fmt: skip
        starts = {
            "train": [*launch, "-m", "megatron_rpsd.training.main"],
            "convert": [str(ROOT / "tools" / "convert_checkpoint.py")],
        }
        command = [sys.executable, *starts[kind], *words]
        print("$ " + " ".join(command), flush=True)
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            output, _ = process.communicate(timeout=self.limit_s)
        except subprocess.TimeoutExpired as late:
            process.terminate()  # torchrun ends its ranks, which a kill would leave behind
            output, _ = process.communicate()
            raise ValueError(f"{kind} did not end within {self.limit_s:.0f} s: {_last_words(output)}") from late
        print(output, flush=True)
        if process.returncode:
            raise ValueError(f"{kind} ended with {process.returncode}: {_last_words(output)}")
        return output


def _last_words(output: str) -> str:
    """The line that says most about a failure."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    telling = [line for line in lines if re.search(r"Error\b|^error:", line) and "ChildFailedError" not in line]
    return (telling or lines or ["it printed nothing"])[-1][:300]


def _make_model(folder: Path, sizes: TrainingSizes) -> None:
    """A random Llama in bf16."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=sizes.vocab_size, hidden_size=sizes.hidden, intermediate_size=2 * sizes.hidden,
        num_hidden_layers=sizes.layers, num_attention_heads=sizes.heads, num_key_value_heads=sizes.heads // 2,
        max_position_embeddings=sizes.length, tie_word_embeddings=True, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)


def _make_corpus(prefix: Path, sizes: TrainingSizes) -> None:
    """Random documents, enough for every step."""
    import numpy as np
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder, get_bin_path, get_idx_path

    builder = IndexedDatasetBuilder(get_bin_path(str(prefix)), dtype=np.uint16)
    generator, tokens = np.random.default_rng(3), 5 * sizes.length
    for _ in range(12):
        builder.add_document(torch.from_numpy(generator.integers(0, sizes.vocab_size, tokens)), [tokens])
    builder.finalize(get_idx_path(str(prefix)))


def logged_steps(folder: Path) -> list[tuple[float, ...]]:
    """(lm loss, view kl, gradient norm) of every step in a run's tensorboard files, fp32.

    Not of the printed lines: Megatron's second one after a resume is the mean of two steps.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    if not folder.is_dir():
        return []
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    if "view kl" not in events.Tags()["scalars"]:
        return []
    columns = [[event.value for event in events.Scalars(name)] for name in ("lm loss", "view kl", "grad-norm")]
    return list(zip(*columns, strict=True))


class _TinyRun:
    """Folders and arguments of the runs; without an imported checkpoint they start from Megatron's random weights."""

    def __init__(self, folder: Path, device: str, sizes: TrainingSizes, runner: Runner) -> None:
        self.folder, self.device, self.sizes, self.runner = folder, device, sizes, runner
        self.imported = False
        _make_model(folder / "hf", sizes)
        _make_corpus(folder / "corpus", sizes)

    def import_model(self) -> None:
        # Tensors stay on the CPU in a conversion, so it runs there, beside the GPU.
        self.runner("convert", ["import", "--hf", self._path("hf"), "--output", self._path("imported"),
                                "--force-cpu-runtime"])  # fmt: skip
        self.imported = True

    def _path(self, name: str) -> str:
        return str(self.folder / name)

    def _start(self) -> list[str]:
        if self.imported:
            return ["--use-checkpoint-args", "--pretrained-checkpoint", self._path("imported")]
        return megatron_arguments(HFFolder(self._path("hf")))

    def train(self, name: str, flags: Sequence[str], more: Sequence[str] = (), log: str | None = None) -> str:
        """What the run printed; its steps are in the folder `log`, by default `name`_log."""
        steps = self.sizes.steps
        words = [
            *self._start(), "--device", self.device, "--tokenizer-type", "NullTokenizer",
            "--data-path", self._path("corpus"), "--split", "100,0,0",
            "--data-cache-path", self._path("cache"), "--seq-length", str(self.sizes.length), "--bf16",
            "--micro-batch-size", "1", "--global-batch-size", "2", "--train-iters", str(steps), "--lr", "1e-4",
            "--lr-decay-style", "cosine", "--lr-warmup-iters", "1", "--eval-iters", "0", "--log-interval", "1",
            "--num-workers", "0", "--objective", "rpsd", "--ckpt-format", "torch_dist",
            "--save", self._path(name), "--save-interval", str(steps // 2),
            "--tensorboard-dir", self._path(log or f"{name}_log"), *flags, *more,
        ]  # fmt: skip
        return self.runner("train", words)

    def steps(self, log: str) -> list[tuple[float, ...]]:
        """See `logged_steps`."""
        return logged_steps(self.folder / log)

    def export(self, name: str) -> Path:
        output = self.folder / f"{name}_hf"
        self.runner("convert", ["export", "--checkpoint", self._path(name), "--hf-reference", self._path("hf"),
                                "--output", str(output), "--force-cpu-runtime"])  # fmt: skip
        return output


def training_rows(device: str, sizes: TrainingSizes, runner: Runner | None = None) -> Iterator[Row]:
    """Import, steps, resume and export with Megatron's local layers; steps with Transformer Engine's where it is."""
    runner = Commands(sizes.limit_s) if runner is None else runner
    with tempfile.TemporaryDirectory() as folder:
        run = _TinyRun(Path(folder), device, sizes, runner)
        said = f"training entry, local layers, {device}"
        for what, rows in (
            ("import", lambda: _import_rows(run)),
            ("steps", lambda: _whole_rows(f"{said}: ", run)),
            ("resume", lambda: _resume_rows(f"{said}: ", run)),
            ("export", lambda: _export_rows(f"{said}: ", run)),
        ):
            yield from guarded("training", f"{said}: {what}", rows)
        software, flags = software_here(device)
        if software.transformer_engine:
            yield from guarded("training", "training entry, Transformer Engine's layers", lambda: _te_rows(run, flags))


def _step_rows(said: str, steps: list[tuple[float, ...]], sizes: TrainingSizes) -> Iterator[Row]:
    yield Row("training", f"{said}steps logged", float(len(steps)), "steps", "", (sizes.steps, sizes.steps))
    smallest = min((kl for _, kl, _ in steps), default=float("nan"))
    yield Row("training", f"{said}smallest view KL", smallest, "nats", "a shifted view reads otherwise",
              (1e-9, float("inf")))  # fmt: skip


def _import_rows(run: _TinyRun) -> Iterator[Row]:
    run.import_model()
    compared, different = different_tensors(run.folder / "hf", run.folder / "imported")
    yield Row("training", "imported tensors that differ bit by bit", float(len(different)), f"of {compared}", "",
              (0.0, 0.0))  # fmt: skip


def _whole_rows(said: str, run: _TinyRun) -> Iterator[Row]:
    printed = run.train("whole", WITHOUT_TE)
    yield from _step_rows(said, run.steps("whole_log"), run.sizes)
    backend = "nccl" if run.device == "cuda" else "gloo"
    listed = re.search(r"distributed_backend \.+ (\w+)", printed)
    yield Row("training", f"{said}runs over {backend}", float(listed is not None and listed[1] == backend), "yes",
              f"Megatron's list of arguments says {listed[1] if listed else 'nothing'}", (1.0, 1.0))  # fmt: skip


def _resume_rows(said: str, run: _TinyRun) -> Iterator[Row]:
    half = str(run.sizes.steps // 2)
    run.train("resumed", WITHOUT_TE, ("--exit-interval", half), "first_log")
    run.train("resumed", WITHOUT_TE, ("--load", str(run.folder / "resumed")), "second_log")
    again = run.steps("first_log") + run.steps("second_log")
    differ = sum(a != b for a, b in zip_longest(again, run.steps("whole_log")))
    yield Row("training", f"{said}steps that differ after a resume", float(differ), "steps",
              f"losses and gradient norms, {half} steps and {half} resumed", (0.0, 0.0))  # fmt: skip


def _export_rows(said: str, run: _TinyRun) -> Iterator[Row]:
    compared, different = different_folders(run.export("whole"), run.export("resumed"))
    yield Row("training", f"{said}exported tensors that a resume changed", float(len(different)), f"of {compared}",
              "bit by bit", (0.0, 0.0))  # fmt: skip
    compared, changed = different_folders(run.folder / "hf", run.folder / "whole_hf")
    yield Row("training", f"{said}exported tensors that training changed", float(len(changed)), f"of {compared}", "",
              (1.0, float(compared)))  # fmt: skip


def _te_rows(run: _TinyRun, flags: Sequence[str]) -> Iterator[Row]:
    run.train("te", flags)
    yield from _step_rows("training entry, Transformer Engine's layers: ", run.steps("te_log"), run.sizes)
