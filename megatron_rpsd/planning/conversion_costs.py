"""Measured time and memory of import and export beside a plain copy of the same tensors, in one process.

The copy reads every tensor of the folder's safetensors (`safe_open`) and writes them again (`save_file`), the least
that a conversion does. Imports of Python packages count for none: a conversion of a model of a few kilobytes comes
first, so that all is imported by the time the clock starts. What a conversion does beyond the copy is in its time:
Megatron's session, the tokenizer, the finite check, and the fsync (the copy leaves its bytes to the system).
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from megatron_rpsd.planning.peak_memory import PeakMemory

WAYS = ("copy", "import", "export")


def copy_tensors(hf: Path, output: Path) -> None:
    """Copy a folder's safetensors, file by file and tensor by tensor."""
    output.mkdir()
    for file in sorted(hf.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            save_file({name: opened.get_tensor(name) for name in opened.keys()}, output / file.name)


def _tiny_model(folder: Path) -> Path:
    """A Llama of one layer."""
    h, ffn, v = 8, 16, 32
    shapes = {"model.embed_tokens": (v, h), "model.norm": (h,), "lm_head": (v, h)}
    layer = "model.layers.0."
    shapes |= {f"{layer}self_attn.{letter}_proj": (h, h) for letter in "qkvo"}
    shapes |= {f"{layer}mlp.{name}_proj": (ffn, h) for name in ("gate", "up")} | {f"{layer}mlp.down_proj": (h, ffn)}
    shapes |= {f"{layer}{name}_layernorm": (h,) for name in ("input", "post_attention")}
    folder.mkdir()
    save_file({f"{name}.weight": torch.ones(shape) for name, shape in shapes.items()}, folder / "model.safetensors")
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": h, "intermediate_size": ffn,
        "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": v, "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def measure_conversion(
    hf: Path, scratch: Path, repetitions: int = 3, progress: Callable[[str], None] = lambda line: None
) -> dict:
    """Seconds and peak bytes of the three ways, interleaved. The CPU runtime has to be installed already.

    Args:
        hf: a Hugging Face folder.
        scratch: where the copies are written and removed again; its file system counts.

    Returns:
        seconds (median) and peak_bytes (largest; resident memory beyond what the process held before) by way, ratio of
        seconds over the copy's, model_bytes, largest_tensor_bytes.
    """
    from megatron_rpsd.checkpoint.convert import export_hf, import_hf
    from megatron_rpsd.checkpoint.hf_folder import HFFolder

    folder = HFFolder(hf)
    sizes = [stored.stop - stored.start for stored in map(folder.stored, folder.names())]
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    peaks: dict[str, list[int]] = {way: [] for way in WAYS}
    scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=scratch) as name:
        root = Path(name)
        for repetition in range(repetitions + 1):
            source = hf if repetition else _tiny_model(root / "tiny")
            runs = {
                "copy": lambda source=source: copy_tensors(source, root / "copy"),
                "import": lambda source=source: import_hf(source, root / "import"),
                "export": lambda source=source: export_hf(root / "import", source, root / "export"),
            }
            for way, run in runs.items():
                os.sync()  # what an earlier way left to the system is not this one's
                memory = PeakMemory("cpu")
                started = time.perf_counter()
                run()
                taken = time.perf_counter() - started
                if repetition:
                    seconds[way].append(taken)
                    peaks[way].append(memory.taken())
                    progress(f"{repetition}/{repetitions} {way}: {taken:.2f} s, {peaks[way][-1] / 2**20:.0f} MiB")
            for way in WAYS:
                shutil.rmtree(root / way)
    median = {way: statistics.median(values) for way, values in seconds.items()}
    return {
        "seconds": median,
        "ratio": {way: median[way] / median["copy"] for way in WAYS[1:]},
        "peak_bytes": {way: max(values) for way, values in peaks.items()},
        "model_bytes": sum(sizes),
        "largest_tensor_bytes": max(sizes),
        "repetitions": repetitions,
        "device": f"cpu, {os.cpu_count()} cores",
    }
