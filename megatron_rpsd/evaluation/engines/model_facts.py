"""What a Hugging Face folder says about its model, read without loading a weight; YaRN for its configuration."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoConfig, PretrainedConfig

from megatron_rpsd.checkpoint.safetensors_file import read_header

LENGTH_DEPENDENT = ("dynamic", "longrope")
"""RoPE types whose frequencies depend on the length of each forward: a prompt in chunks would be another model."""
_WINDOW_IS_FACTOR_TIMES = ("linear", "dynamic", "yarn")


@dataclass(frozen=True)
class ModelFacts:
    """A model before it is loaded.

    Attributes:
        folder: Hugging Face's.
        config: transformers' own reading of config.json, of the text model where there are several.
        parameters: all of them, counted in the weights' headers; 0 where the folder has no safetensors.
        matrix_parameters: without the input embedding and, as logits are wanted of one position, the output layer.
    """

    folder: Path
    config: PretrainedConfig
    parameters: int
    matrix_parameters: int

    @property
    def rope(self) -> dict:
        """rope_parameters, by transformers 5's schema; {} where the model has none."""
        return dict(getattr(self.config, "rope_parameters", None) or {})

    @property
    def rope_type(self) -> str:
        """`default` unless the model scales its RoPE; `per layer` where layers differ."""
        if any(isinstance(value, dict) for value in self.rope.values()):
            return "per layer"
        return self.rope.get("rope_type") or "default"

    @property
    def window(self) -> int:
        """Positions that the model is declared good for, its own scaling included."""
        declared = self.config.max_position_embeddings
        original, factor = self.rope.get("original_max_position_embeddings"), self.rope.get("factor")
        if self.rope_type in _WINDOW_IS_FACTOR_TIMES and factor:
            return max(declared, int((original or declared) * factor))
        return declared

    def flops(self, tokens: int) -> float:
        """Multiply-adds times 2 of one forward over `tokens`: 2 a weight and token, and causal attention's 2 h t^2."""
        heads = getattr(self.config, "num_attention_heads", 0)
        width = heads * (getattr(self.config, "head_dim", None) or self.config.hidden_size // max(1, heads))
        return 2.0 * self.matrix_parameters * tokens + 2.0 * self.config.num_hidden_layers * width * tokens**2


def read_model(folder: Path) -> ModelFacts:
    """The facts of a folder; ValueError where it holds no readable config.json or damaged weights."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"--hf {folder} holds no config.json: not a Hugging Face model folder")
    try:
        whole = AutoConfig.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"--hf {folder}: transformers cannot read its config.json: {error}") from None
    config = whole.get_text_config()
    counts = {
        name: math.prod(tensor.shape)
        for path in sorted(folder.glob("*.safetensors"))
        for name, tensor in read_header(path).items()
    }
    tables = sum(count for name, count in counts.items() if "embed_tokens" in name or name.startswith("lm_head"))
    return ModelFacts(folder, config, sum(counts.values()), sum(counts.values()) - tables)


def yarn_factor(facts: ModelFacts, wanted: str, longest: int) -> float | None:
    """The factor to run with, None for none.

    Args:
        wanted: `--yarn-factor` as typed: a number, or `auto` for the smallest that covers `longest`; "" for none.
        longest: tokens of the longest length.

    Raises:
        ValueError: not a number of at least 1, or the model scales its RoPE already.
    """
    if not wanted:
        return None
    if wanted == "auto":
        factor = max(1.0, longest / facts.window)
    else:
        try:
            factor = float(wanted)
        except ValueError:
            factor = math.nan
        if not math.isfinite(factor) or factor < 1:
            raise ValueError(f"--yarn-factor {wanted}: give a number of at least 1, or auto")
    if factor == 1:
        return None
    if facts.rope_type != "default":
        raise ValueError(
            f"--yarn-factor {wanted}: the model's RoPE has rope_type {facts.rope_type} already, good for "
            f"{facts.window} tokens; YaRN goes on top of an unscaled RoPE only"
        )
    if facts.rope.get("rope_theta") is None:
        raise ValueError(f"--yarn-factor {wanted}: {facts.folder}/config.json has no RoPE base to keep")
    return factor


def yarn_parameters(facts: ModelFacts, factor: float) -> dict:
    """rope_parameters of transformers 5 with YaRN (arXiv 2309.00071): the model's own base, its window times factor."""
    return facts.rope | {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": facts.config.max_position_embeddings,
    }


def file_sha256(path: Path) -> str:
    """SHA-256 of a whole file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_sha256(folder: Path) -> str | None:
    """One SHA-256 over every weight file's name, size, safetensors header and 16 blocks of 4 KiB of its values.

    None without safetensors. A header holds every tensor's name, type, shape and place; the blocks tell two training
    steps of one model apart. Other values are not read, so that hundreds of gigabytes take no time.
    """
    files = sorted(folder.glob("*.safetensors"))
    digest = hashlib.sha256()
    for path in files:
        size, part = path.stat().st_size, hashlib.sha256()
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            part.update(file.read(length))
            for block in range(16):
                file.seek(8 + length + (size - 8 - length) * block // 16)
                part.update(file.read(4096))
        digest.update(f"{path.name} {size} {part.hexdigest()}\n".encode())
    return digest.hexdigest() if files else None


def model_identity(facts: ModelFacts, factor: float | None) -> dict:
    """What run.json and the scores say about the model."""
    index = facts.folder / "model.safetensors.index.json"
    tokenizer = facts.folder / "tokenizer.json"
    return {
        "path": str(facts.folder.absolute()),
        "config_sha256": file_sha256(facts.folder / "config.json"),
        "tokenizer_sha256": file_sha256(tokenizer) if tokenizer.is_file() else None,
        "index_sha256": file_sha256(index) if index.is_file() else None,
        "weights_sha256": weights_sha256(facts.folder),
        "parameters": facts.parameters,
        "max_position_embeddings": facts.config.max_position_embeddings,
        "rope": json.loads(json.dumps(facts.rope if factor is None else yarn_parameters(facts, factor))),
    }
