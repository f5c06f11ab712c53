"""How one tensor of a Megatron GPTModel is laid out, against Hugging Face and over tensor-parallel ranks.

Two forms of every tensor appear here:

* *full*: Megatron's row order, all ranks together, vocabulary rows not padded;
* *local*: what one tensor-parallel rank holds.

Every operation only copies, reorders or stacks rows and columns. Each is therefore bitwise invertible, keeps the dtype
and applies to a gradient exactly as to its parameter. Results own their memory: they never alias the tensors passed in.

Shape letters: h hidden, n query heads, g KV groups, d head dimension, v vocabulary, ffn the feed-forward width.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

_FLAG = "--tensor-model-parallel-size"


@dataclass(frozen=True)
class ModelDimensions:
    """The sizes and switches of a dense decoder that decide which tensors exist and what shape they have."""

    num_layers: int
    """Decoder layers."""
    hidden_size: int
    """h."""
    ffn_hidden_size: int
    """Width of the gated feed-forward network; its first weight has twice as many rows."""
    num_attention_heads: int
    """n."""
    num_query_groups: int
    """g, the number of key/value heads; divides n."""
    head_dim: int
    """d; n * d need not equal h."""
    vocab_size: int
    """v, without padding."""
    tied: bool
    """Whether the output layer is the embedding; then no output weight exists."""
    qk_norm: bool
    """Whether queries and keys are normalised per head (Qwen3)."""
    qkv_bias: bool
    """Whether the query, key and value projections have a bias (Qwen2)."""

    @property
    def rows_per_group(self) -> int:
        """Rows of the fused QKV tensor that belong to one KV group: (n/g + 2) * d."""
        return (self.num_attention_heads // self.num_query_groups + 2) * self.head_dim


def bitwise_equal(left: Tensor, right: Tensor) -> bool:
    """True when shape, dtype and every bit agree (so NaN equals itself and 0.0 differs from -0.0)."""
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    return torch.equal(left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8))


class Layout(ABC):
    """The four conversions of one kind of tensor. Instances carry no tensors and may be shared."""

    def to_megatron(self, hf_tensors: list[Tensor], dims: ModelDimensions) -> Tensor:
        """The Hugging Face tensors, in the table's order -> the full tensor, contiguous; it may be the one given."""
        (tensor,) = hf_tensors
        return tensor.contiguous()

    def to_hf(self, full: Tensor, dims: ModelDimensions) -> list[Tensor]:
        """The inverse of :meth:`to_megatron`: contiguous, and parts of the memory given where they can be."""
        return [full.contiguous()]

    @abstractmethod
    def split(
        self, full: Tensor, tp_size: int, tp_rank: int, dims: ModelDimensions, padded_vocab_size: int | None = None
    ) -> Tensor:
        """The local tensor of rank ``tp_rank``.

        Args:
            padded_vocab_size: rows of the vocabulary over all ranks; only vocabulary tensors read it.

        Raises:
            ValueError: the tensor cannot be shared evenly among ``tp_size`` ranks.
        """

    @abstractmethod
    def merge(self, locals: list[Tensor], dims: ModelDimensions) -> Tensor:
        """The local tensors of ranks 0, 1, ... -> the full tensor. The inverse of :meth:`split`."""


class Replicated(Layout):
    """Every rank holds the same tensor: the norms."""

    def split(
        self, full: Tensor, tp_size: int, tp_rank: int, dims: ModelDimensions, padded_vocab_size: int | None = None
    ) -> Tensor:
        assert 0 <= tp_rank < tp_size
        return full.clone(memory_format=torch.contiguous_format)

    def merge(self, locals: list[Tensor], dims: ModelDimensions) -> Tensor:
        """Rank 0's tensor. Raises ValueError when another rank's differs in any bit."""
        for rank, local in enumerate(locals[1:], start=1):
            if not bitwise_equal(locals[0], local):
                raise ValueError(
                    f"a tensor of shape {list(locals[0].shape)} that every tensor-parallel rank should hold alike "
                    f"differs between ranks 0 and {rank}: they drifted apart in training or are of different steps"
                )
        return locals[0].clone(memory_format=torch.contiguous_format)


class _Contiguous(Layout):
    """Equal consecutive slices along one axis; ``unit`` names the dimension of the model that must not be cut."""

    axis: int

    def __init__(self, unit: str):
        self.unit = unit

    def split(
        self, full: Tensor, tp_size: int, tp_rank: int, dims: ModelDimensions, padded_vocab_size: int | None = None
    ) -> Tensor:
        assert 0 <= tp_rank < tp_size
        self._check(tp_size, dims)
        size = _share(full.shape[self.axis], tp_size, f"axis {self.axis} of a tensor of shape {list(full.shape)}")
        return full.narrow(self.axis, tp_rank * size, size).clone(memory_format=torch.contiguous_format)

    def merge(self, locals: list[Tensor], dims: ModelDimensions) -> Tensor:
        return torch.cat(locals, dim=self.axis)

    def _check(self, tp_size: int, dims: ModelDimensions) -> None:
        _share(getattr(dims, self.unit), tp_size, self.unit)


class Column(_Contiguous):
    """Output rows shared out, as in a column-parallel linear layer: [out, in] -> [out/tp, in]."""

    axis = 0


class Row(_Contiguous):
    """Input columns shared out, as in a row-parallel linear layer: [out, in] -> [out, in/tp]."""

    axis = 1


class Vocabulary(Layout):
    """Embedding and output weight: [v, h] full, [padded v / tp, h] local; the padding rows are zero and come last."""

    def to_megatron(self, hf_tensors: list[Tensor], dims: ModelDimensions) -> Tensor:
        (tensor,) = hf_tensors
        _expect_rows(tensor, dims.vocab_size, f"vocab_size={dims.vocab_size}")
        return tensor.contiguous()

    def split(
        self, full: Tensor, tp_size: int, tp_rank: int, dims: ModelDimensions, padded_vocab_size: int | None = None
    ) -> Tensor:
        """Without ``padded_vocab_size`` the vocabulary itself has to divide by ``tp_size``."""
        assert 0 <= tp_rank < tp_size and full.shape[0] == dims.vocab_size
        padded = dims.vocab_size if padded_vocab_size is None else padded_vocab_size
        if padded < dims.vocab_size:
            raise ValueError(f"padded vocabulary {padded} < vocab_size {dims.vocab_size}: it must hold every token")
        size = _share(padded, tp_size, "the padded vocabulary")
        vocab_start = tp_rank * size
        vocab_stop = min(vocab_start + size, dims.vocab_size)
        local = full.new_zeros((size, *full.shape[1:]))
        if vocab_stop > vocab_start:
            local[: vocab_stop - vocab_start].copy_(full[vocab_start:vocab_stop])
        return local

    def merge(self, locals: list[Tensor], dims: ModelDimensions) -> Tensor:
        """Padding rows are dropped, whatever they hold."""
        rows = sum(local.shape[0] for local in locals)
        if rows < dims.vocab_size:
            raise ValueError(f"the vocabulary shards hold {rows} rows, fewer than vocab_size={dims.vocab_size}")
        return torch.cat(locals, dim=0)[: dims.vocab_size].clone()


class Qkv(Column):
    """Query, key and value projections fused; weight [(n + 2g) * d, h] or bias [(n + 2g) * d].

    Rows of the full tensor, for n/g = 2, one block of d rows per letter::

        q0 q1 k0 v0 | q2 q3 k1 v1 | ...       one stretch per KV group

    With g a multiple of tp each rank holds whole groups. With tp a multiple of g a group is cut into tp/g equal
    stretches of rows, without regard to heads: Megatron gathers the group's outputs again before use.
    """

    def __init__(self):
        super().__init__("num_attention_heads")

    def to_megatron(self, hf_tensors: list[Tensor], dims: ModelDimensions) -> Tensor:
        """[q_proj, k_proj, v_proj] -> fused."""
        query, key, value = hf_tensors
        n, g, d = dims.num_attention_heads, dims.num_query_groups, dims.head_dim
        _expect_rows(query, n * d, f"num_attention_heads * head_dim = {n} * {d}")
        _expect_rows(key, g * d, f"num_key_value_heads * head_dim = {g} * {d}")
        _expect_rows(value, g * d, f"num_key_value_heads * head_dim = {g} * {d}")
        grouped = [tensor.reshape(g, -1, *tensor.shape[1:]) for tensor in (query, key, value)]
        return torch.cat(grouped, dim=1).flatten(0, 1)

    def to_hf(self, full: Tensor, dims: ModelDimensions) -> list[Tensor]:
        """Fused -> [q_proj, k_proj, v_proj]."""
        g, d = dims.num_query_groups, dims.head_dim
        _expect_rows(full, g * dims.rows_per_group, f"num_query_groups * rows per group = {g} * {dims.rows_per_group}")
        grouped = full.reshape(g, dims.rows_per_group, *full.shape[1:])
        parts = grouped.split([dims.rows_per_group - 2 * d, d, d], dim=1)
        return [part.flatten(0, 1).contiguous() for part in parts]

    def _check(self, tp_size: int, dims: ModelDimensions) -> None:
        super()._check(tp_size, dims)
        groups = dims.num_query_groups
        if groups % tp_size and tp_size % groups:
            raise ValueError(
                f"{_FLAG} {tp_size}: num_query_groups={groups} is neither a multiple nor a divisor of it "
                f"({groups} % {tp_size} = {groups % tp_size}, {tp_size} % {groups} = {tp_size % groups}); "
                f"choose a size that divides {groups} or a multiple of it"
            )


class GatedMlp(Layout):
    """First weight of a SwiGLU network: full [2 * ffn, h] = [gate; up], local [gate shard; up shard]."""

    def to_megatron(self, hf_tensors: list[Tensor], dims: ModelDimensions) -> Tensor:
        """[gate_proj, up_proj] -> stacked."""
        gate, up = hf_tensors
        for tensor in (gate, up):
            _expect_rows(tensor, dims.ffn_hidden_size, f"intermediate_size={dims.ffn_hidden_size}")
        return torch.cat([gate, up], dim=0)

    def to_hf(self, full: Tensor, dims: ModelDimensions) -> list[Tensor]:
        """Stacked -> [gate_proj, up_proj]."""
        _expect_rows(full, 2 * dims.ffn_hidden_size, f"2 * ffn_hidden_size = 2 * {dims.ffn_hidden_size}")
        return [half.contiguous() for half in full.chunk(2, dim=0)]

    def split(
        self, full: Tensor, tp_size: int, tp_rank: int, dims: ModelDimensions, padded_vocab_size: int | None = None
    ) -> Tensor:
        assert 0 <= tp_rank < tp_size
        size = _share(dims.ffn_hidden_size, tp_size, "ffn_hidden_size")
        gate, up = full.chunk(2, dim=0)
        return torch.cat([half.narrow(0, tp_rank * size, size) for half in (gate, up)], dim=0)

    def merge(self, locals: list[Tensor], dims: ModelDimensions) -> Tensor:
        halves = [local.chunk(2, dim=0) for local in locals]
        return torch.cat([gate for gate, _ in halves] + [up for _, up in halves], dim=0)


def _share(size: int, tp_size: int, what: str) -> int:
    """``size / tp_size``, or ValueError with the arithmetic."""
    if size % tp_size:
        raise ValueError(
            f"{_FLAG} {tp_size} does not divide {what}={size}: {size} % {tp_size} = {size % tp_size}; "
            f"choose a size that divides {size}"
        )
    return size // tp_size


def _expect_rows(tensor: Tensor, rows: int, because: str) -> None:
    if tensor.shape[0] != rows:
        raise ValueError(f"a tensor of shape {list(tensor.shape)} should have {rows} rows, since {because}")
