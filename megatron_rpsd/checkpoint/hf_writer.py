"""Writing a Hugging Face model folder: sharded safetensors, config.json, and the tokenizer of a reference model.

Names, shapes and places of all tensors are known before the first is read, so each goes straight to its place, from
whichever rank holds it. A folder of the wanted name is always whole (see ``partial_folder``).
"""

import contextlib
import copy
import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_rpsd.checkpoint.hf_folder import INDEX_FILE, SINGLE_FILE, SUPPORTED_SCALINGS
from megatron_rpsd.checkpoint.partial_folder import partial_folder, rank, refuse_existing, world_size
from megatron_rpsd.checkpoint.progress import Progress
from megatron_rpsd.checkpoint.safetensors_file import TensorSpec, plan_file, write_all, write_tensor

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


class Source(NamedTuple):
    """Tensors that are read together: what they are, and a function that reads them."""

    specs: Sequence[TensorSpec]
    read: Callable[[], Sequence[Tensor]]

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.specs)


def write_hf_folder(
    output: str | Path, sources: Sequence[Source], config: dict, reference: str | Path, max_shard_bytes: float = 5e9
) -> None:
    """Write a complete model folder, on all ranks of the job together.

    Args:
        output: the folder to make; its parent is made when absent.
        sources: the same on every rank; each is read by one of them, one at a time.
        config: the content of config.json.
        reference: the folder that tokenizer, generation config, chat template and licence are copied from.
        max_shard_bytes: largest sum of tensor sizes in one file, in bytes; a larger tensor has a file to itself.

    Raises:
        ValueError: ``output`` exists, ``reference`` is not a folder, or the device is full.
        Whatever a source raises; nothing is left behind then.
    """
    output, reference = Path(output), Path(reference)
    refuse_existing(output)
    if not reference.is_dir():
        raise ValueError(f"{reference} is not a folder; it should be the Hugging Face model that training started from")
    if not max_shard_bytes > 0:
        raise ValueError(f"--max-shard-gigabytes {max_shard_bytes / 1e9:g} must be positive")
    files = _plan_files([spec for source in sources for spec in source.specs], max_shard_bytes)
    mine = _share(sources, rank(), world_size())
    with partial_folder(output) as partial:
        _write_tensors(partial, files, mine)
        if rank() == 0:
            _write_json(partial / "config.json", config)
            if len(files) > 1:
                _write_json(partial / INDEX_FILE, _index(files))
            _copy_companions(reference, partial)


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


def with_yarn(scaling: dict | None, max_position_embeddings: int, factor: float) -> tuple[dict, int]:
    """Scaling and declared length of a model that shall extrapolate beyond its window by YaRN (arXiv 2309.00071).

    Args:
        scaling: what the model was trained with; has to be None, since two scalings do not add up.
        max_position_embeddings: the window that the model was trained at, in positions.
        factor: the declared length over that window, > 1.
    """
    if scaling is not None:
        raise ValueError(
            f"--yarn-factor {factor:g}: the model was trained with rope_type {scaling['rope_type']!r} already; "
            "YaRN goes on top of an unscaled RoPE only"
        )
    if not math.isfinite(factor) or factor <= 1:
        raise ValueError(f"--yarn-factor {factor:g} must be a finite number greater than 1")
    yarn = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": max_position_embeddings}
    return yarn, int(max_position_embeddings * factor)


def _plan_files(specs: Sequence[TensorSpec], max_shard_bytes: float) -> dict[str, list[TensorSpec]]:
    """File name -> its tensors, in order."""
    assert specs, "a model without tensors"
    shards: list[list[TensorSpec]] = [[]]
    size = 0
    for spec in specs:
        if shards[-1] and size + spec.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(spec)
        size += spec.nbytes
    if len(shards) == 1:
        return {SINGLE_FILE: shards[0]}
    return {f"model-{n:05d}-of-{len(shards):05d}.safetensors": shard for n, shard in enumerate(shards, 1)}


def _index(files: dict[str, list[TensorSpec]]) -> dict:
    weight_map = {spec.name: file_name for file_name, specs in files.items() for spec in specs}
    total = sum(spec.nbytes for specs in files.values() for spec in specs)
    return {"metadata": {"total_size": total}, "weight_map": weight_map}


def _share(sources: Sequence[Source], rank: int, world_size: int) -> list[Source]:
    """What this rank writes: the largest first, each to the rank with the fewest bytes so far."""
    loads = [0] * world_size
    mine = []
    for index in sorted(range(len(sources)), key=lambda index: (-sources[index].nbytes, index)):
        taker = loads.index(min(loads))
        loads[taker] += sources[index].nbytes
        if taker == rank:
            mine.append(index)
    return [sources[index] for index in sorted(mine)]


def _write_tensors(folder: Path, files: dict[str, list[TensorSpec]], sources: Sequence[Source]) -> None:
    plans = {file_name: plan_file(specs) for file_name, specs in files.items()}
    file_of = {spec.name: file_name for file_name, specs in files.items() for spec in specs}
    progress = Progress("export", sum(source.nbytes for source in sources))
    with contextlib.ExitStack() as stack:
        # Any rank may come first. Readable by others, as the umask says; safetensors' own writer leaves 0600.
        descriptors = {name: os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o666) for name in files}
        for descriptor in descriptors.values():
            stack.callback(os.close, descriptor)
        if rank() == 0:
            for name, (header, _) in plans.items():
                write_all(descriptors[name], header, 0)
        for source in sources:
            for spec, tensor in zip(source.specs, source.read(), strict=True):
                name = file_of[spec.name]
                write_tensor(descriptors[name], plans[name][1][spec.name], tensor)
            progress.add(source.nbytes)
        progress.close()


def _copy_companions(reference: Path, folder: Path) -> None:
    for pattern in _COPIED:
        for source in sorted(reference.glob(pattern)):
            if source.is_file():
                target = folder / source.relative_to(reference)
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(source, target)


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
