"""Hugging Face tensors into the stages of a Megatron model of any layout, and a model's tensors by global name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_rpsd.checkpoint.families import MappedTensor, entries, local_spec_name
from megatron_rpsd.checkpoint.hf_folder import HFFolder
from megatron_rpsd.checkpoint.layouts import ModelDimensions

_LAYERS = "decoder.layers."
_EMBEDDING = "embedding.word_embeddings.weight"
_OUTPUT = "output_layer.weight"


def named_parameters(stages: Sequence[torch.nn.Module]) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Parameters of all stages of this rank by their name in the whole model (layers counted over the pipeline).

    The tied output weight, which the last pipeline stage holds as a copy of the embedding, keeps its own name.
    """
    for stage in unwrap_model(list(stages)):
        for name, parameter in stage.named_parameters():
            if name.startswith(_LAYERS):
                local_index, rest = name.removeprefix(_LAYERS).split(".", 1)
                index = stage.decoder.layers[int(local_index)].layer_number - 1
                name = f"{_LAYERS}{index}.{rest}"
            yield local_spec_name(name), parameter


def table_by_name(dims: ModelDimensions) -> dict[str, MappedTensor]:
    """The table's lines by Megatron name, the tied output weight included as another name of the embedding."""
    table = {mapped.megatron_name: mapped for mapped in entries(dims)}
    if dims.tied:
        table[_OUTPUT] = table[_EMBEDDING]
    return table


@torch.no_grad()
def load_hf_weights(
    stages: Sequence[torch.nn.Module], folder: HFFolder, tp_size: int, tp_rank: int, padded_vocab_size: int
) -> None:
    """Fill this rank's stages from a Hugging Face folder, reading only the tensors that they hold.

    Raises:
        ValueError: the folder's tensors are not the model's, or tensor parallelism does not divide them.
    """
    folder.check()
    dims = folder.dimensions()
    table = table_by_name(dims)
    for name, parameter in named_parameters(stages):
        mapped = table.get(name)
        assert mapped is not None, f"the model has a parameter {name} that the table does not know"
        full = mapped.layout.to_megatron([folder.tensor(hf_name) for hf_name in mapped.hf_names], dims)
        local = mapped.layout.split(full, tp_size, tp_rank, dims, padded_vocab_size)
        assert local.shape == parameter.shape, (name, tuple(local.shape), tuple(parameter.shape))
        parameter.copy_(local)


def full_tensors(stages: Sequence[torch.nn.Module], dims: ModelDimensions) -> Iterator[tuple[str, Tensor]]:
    """(Megatron name, full tensor without vocabulary padding) of a model that one rank holds whole."""
    table = table_by_name(dims)
    for name, parameter in named_parameters(stages):
        yield name, table[name].layout.merge([parameter.detach()], dims)
