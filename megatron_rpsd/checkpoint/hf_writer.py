"""Writing a Hugging Face model folder: sharded safetensors, config.json, and the tokenizer of a reference model.

The folder is built beside its final place and renamed at the end, so that a folder of the wanted name is always whole.
"""

import copy
import json
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_rpsd.checkpoint.hf_folder import INDEX_FILE, SINGLE_FILE, SUPPORTED_SCALINGS

# Tokenizer, generation defaults, chat template; and the licence, which most models require to travel with derived
# weights. Nothing executable: Python files that a reference folder may carry stay behind.
_COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tekken.json",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)


def write_hf_folder(
    output: str | Path,
    tensors: Iterator[tuple[str, Tensor]],
    config: dict,
    reference: str | Path,
    max_shard_bytes: float = 5e9,
) -> None:
    """Write a complete model folder.

    Args:
        output: the folder to make; its parent is made when absent.
        tensors: (Hugging Face name, tensor), consumed as a stream with at most one shard and one tensor in memory. The
            caller may overwrite a tensor once the next one is asked for.
        config: the content of config.json.
        reference: the folder that tokenizer, generation config, chat template and licence are copied from.
        max_shard_bytes: largest sum of tensor sizes in one file, in bytes; a larger tensor has a file to itself.

    Raises:
        ValueError: ``output`` exists, or ``reference`` is not a folder.
        Whatever ``tensors`` raises; nothing is left behind then. A killed process leaves only a folder whose name
        starts with a dot and contains ``.partial-``.
    """
    output, reference = Path(output), Path(reference)
    if output.exists() or output.is_symlink():
        raise ValueError(f"{output} exists already; name a new folder, or remove that one first")
    if not reference.is_dir():
        raise ValueError(f"{reference} is not a folder; it should be the Hugging Face model that training started from")
    if max_shard_bytes <= 0:
        raise ValueError(f"max_shard_bytes={max_shard_bytes} must be positive")
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.parent / f".{output.name}.partial-{uuid.uuid4().hex[:12]}"
    partial.mkdir()
    try:
        _write_tensors(partial, tensors, max_shard_bytes)
        _write_json(partial / "config.json", config)
        _copy_companions(reference, partial)
        partial.rename(output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def exported_config(
    reference_config: dict,
    rotary_base: float,
    scaling: dict | None,
    max_position_embeddings: int,
    dtype: torch.dtype,
) -> dict:
    """config.json for a model trained from the reference: as the reference, with the RoPE and length it was trained at.

    RoPE is written in both schemas. transformers before 5 ignores ``rope_parameters`` and would take a base of 10,000;
    transformers 5 prefers ``rope_scaling`` when it is set and otherwise reads ``rope_parameters``. The dtype is written
    under the old and the new key for the same reason.

    Args:
        rotary_base: theta.
        scaling: in Hugging Face's schema, {"rope_type": ..., ...} without ``rope_theta``; None for plain RoPE.
        max_position_embeddings: positions the model is declared good for.
        dtype: of the stored weights.
    """
    assert scaling is None or (scaling.get("rope_type") in SUPPORTED_SCALINGS and "rope_theta" not in scaling)
    config = copy.deepcopy(reference_config)
    # The length before scaling is part of the scaling here; a top-level copy would take precedence over it. Code that
    # auto_map points to is not copied, and a local path in _name_or_path means nothing to the reader.
    for stale in ("original_max_position_embeddings", "partial_rotary_factor", "auto_map", "_name_or_path"):
        config.pop(stale, None)
    config["max_position_embeddings"] = max_position_embeddings
    config["rope_theta"] = rotary_base
    config["rope_scaling"] = copy.deepcopy(scaling)
    config["rope_parameters"] = {"rope_type": "default", **copy.deepcopy(scaling or {}), "rope_theta": rotary_base}
    if config.get("model_type") == "mistral":
        # Training attends to the whole context. An absent key would mean a window of 4,096.
        config["sliding_window"] = None
    config["torch_dtype"] = config["dtype"] = str(dtype).removeprefix("torch.")
    return config


def _write_tensors(folder: Path, tensors: Iterator[tuple[str, Tensor]], max_shard_bytes: float) -> None:
    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    pending_bytes = total_bytes = 0
    seen: set[str] = set()

    def flush() -> None:
        save_file(pending, folder / f"{len(shards)}.part", metadata={"format": "pt"})
        shards.append(list(pending))
        pending.clear()

    for name, tensor in tensors:
        assert name not in seen, f"tensor {name} comes twice"
        seen.add(name)
        size = tensor.numel() * tensor.element_size()
        if pending and pending_bytes + size > max_shard_bytes:
            flush()
            pending_bytes = 0
        # A copy: a view would keep its whole storage alive, and the caller may reuse the tensor.
        pending[name] = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())
        pending_bytes += size
        total_bytes += size
    assert pending, "a model without tensors"
    flush()
    _name_shards(folder, shards, total_bytes)


def _name_shards(folder: Path, shards: list[list[str]], total_bytes: int) -> None:
    """Give the files their final names, which hold the number of files; with several, write the index too."""
    if len(shards) == 1:
        (folder / "0.part").rename(folder / SINGLE_FILE)
        return
    weight_map = {}
    for index, names in enumerate(shards):
        file_name = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"{index}.part").rename(folder / file_name)
        weight_map.update(dict.fromkeys(names, file_name))
    _write_json(folder / INDEX_FILE, {"metadata": {"total_size": total_bytes}, "weight_map": weight_map})


def _copy_companions(reference: Path, folder: Path) -> None:
    for pattern in _COPIED:
        for source in sorted(reference.glob(pattern)):
            if source.is_file():
                target = folder / source.relative_to(reference)
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(source, target)


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
