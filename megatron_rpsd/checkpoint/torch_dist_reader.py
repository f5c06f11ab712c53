"""The model's tensors of a torch_dist checkpoint, whole, one at a time, without building a model."""

from __future__ import annotations

import itertools
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_rpsd.checkpoint.families import MappedTensor, entries
from megatron_rpsd.checkpoint.layouts import ModelDimensions, Vocabulary
from megatron_rpsd.checkpoint.safetensors_file import TensorSpec
from megatron_rpsd.checkpoint.torch_dist_writer import global_name

_MODEL_PARTS = ("embedding", "decoder", "output_layer")  # all else is the optimizer's, the schedule's or Megatron's


class TorchDistModel:
    """The model of one checkpoint.

    Args:
        folder: from `checkpoint_folder`.
        dims: of the Hugging Face model that it should be.

    Raises:
        ValueError: tensors are missing, of another shape, or not the model's.
    """

    def __init__(self, folder: Path, dims: ModelDimensions) -> None:
        self.dims = dims
        self._reader = FileSystemReader(folder)
        metadata = self._reader.read_metadata()
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        self._places = dict(self._model_tensors(metadata.state_dict_metadata))
        self._table = entries(dims)
        self._check(folder)

    def _model_tensors(self, stored: dict):
        """(name in the whole model, (key, layer or None, the tensor's storage metadata))."""
        for key, metadata in stored.items():
            if not isinstance(metadata, TensorStorageMetadata) or key.split(".")[0] not in _MODEL_PARTS:
                continue
            rest = key.removeprefix("decoder.layers.")
            stacked = rest != key and not rest.split(".")[0].isdigit()
            for layer in range(metadata.size[0]) if stacked else [None]:
                name, _ = global_name(key, () if layer is None else (layer,), int(stacked))
                yield name, (key, layer, metadata)

    def _check(self, folder: Path) -> None:
        expected = {mapped.megatron_name: mapped for mapped in self._table}
        surplus = sorted(set(self._places) - set(expected))
        missing = [name for name in expected if name not in self._places]
        for names, what in ((missing, "lacks"), (surplus, "holds what the Hugging Face model has no place for:")):
            if names:
                raise ValueError(f"{folder}: the checkpoint {what} {len(names)} tensor(s), first {names[0]}")
        for name, mapped in expected.items():
            shape, found = full_shape(mapped), self._shape(name)
            rows_fit = found[0] >= shape[0] if isinstance(mapped.layout, Vocabulary) else found[0] == shape[0]
            if not rows_fit or found[1:] != shape[1:]:
                raise ValueError(
                    f"{folder}: {name} has shape {list(found)}, the Hugging Face model's {list(shape)}: they are "
                    "different models"
                )

    def _shape(self, name: str) -> tuple[int, ...]:
        _, layer, metadata = self._places[name]
        return tuple(metadata.size[0 if layer is None else 1 :])

    def tensors(self) -> list[MappedTensor]:
        """The table's lines."""
        return self._table

    def specs(self, mapped: MappedTensor, dtype: torch.dtype | None = None) -> list[TensorSpec]:
        """What :meth:`hf_tensors` will give for a line, without reading it."""
        dtype = dtype or self.dtype(mapped.megatron_name)
        return [TensorSpec(name, dtype, shape) for name, shape in zip(mapped.hf_names, mapped.hf_shapes, strict=True)]

    def dtype(self, name: str) -> torch.dtype:
        """Of the stored tensor."""
        return self._places[name][2].properties.dtype

    def hf_tensors(self, mapped: MappedTensor, dtype: torch.dtype | None = None) -> list[Tensor]:
        """The Hugging Face tensors of a line of the table, read now."""
        return [tensor.to(dtype or tensor.dtype) for tensor in mapped.layout.to_hf(self.full(mapped), self.dims)]

    def full(self, mapped: MappedTensor) -> Tensor:
        """One of Megatron's tensors, without the vocabulary's padding, whatever layout wrote it.

        Raises:
            ValueError: a file is damaged.
        """
        key, layer, metadata = self._places[mapped.megatron_name]
        shape = full_shape(mapped)
        leading = () if layer is None else (layer,)
        box = ChunkStorageMetadata(
            torch.Size((*leading, *(0 for _ in shape))), torch.Size((*(1 for _ in leading), *shape))
        )
        full = torch.empty(box.sizes, dtype=metadata.properties.dtype)
        items = create_read_items_for_chunk_list(key, metadata, [box])
        read = sum(int(torch.Size(item.lengths).numel()) for item in items)
        if read != full.numel():
            raise ValueError(f"{self._reader.path}: the checkpoint has {read} of the {full.numel()} values of {key}")
        try:
            self._reader.read_data(LoadPlan(items), _Into(full))
        except (OSError, RuntimeError, EOFError) as error:
            raise ValueError(f"{self._reader.path}: cannot read {key}: {str(error).splitlines()[0]}") from error
        return full.view(shape)


def full_shape(mapped: MappedTensor) -> tuple[int, ...]:
    """Of Megatron's tensor that a line's Hugging Face tensors make up: their rows together."""
    rows = sum(shape[0] for shape in mapped.hf_shapes)
    return (rows, *itertools.chain(mapped.hf_shapes[0][1:]))


class _Into:
    """The part of torch's LoadPlanner that a reader calls: where the values of an item go."""

    def __init__(self, target: Tensor) -> None:
        self._target = target

    def resolve_tensor(self, item: ReadItem) -> Tensor:
        place = self._target
        for axis, (start, size) in enumerate(zip(item.dest_offsets, item.lengths, strict=True)):
            place = place.narrow(axis, start, size)
        return place

    def commit_tensor(self, item: ReadItem, tensor: Tensor) -> None:
        """Nothing is left to do: the values are in their place."""
