"""A torch_dist checkpoint written tensor by tensor, by Megatron's own `save_checkpoint`.

Megatron's model, built on the meta device, says which pieces of which tensors this rank saves; a function reads each
piece when its turn comes. The model is never held. Megatron's own writer holds it whole, starts a process of its own
for every save, and torch's file writer (2.14) keeps every tensor alive until the file is closed.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, is_main_replica
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from megatron_rpsd.checkpoint.families import local_spec_name
from megatron_rpsd.model import RPSDModelConfig

_LAYERS = "decoder.layers."

ReadPiece = Callable[[str, tuple[int, ...], tuple[int, ...], torch.dtype], Tensor]
"""(parameter name in the whole model, offset in the full tensor, shape, dtype) -> the piece."""


def meta_stages(config: RPSDModelConfig) -> list[torch.nn.Module]:
    """This rank's pipeline stage without values: what it holds, and how Megatron saves it."""
    groups = ProcessGroupCollection.use_mpu_process_groups()
    config.transformer.use_cpu_initialization = config.transformer.init_model_with_meta_device = True
    builder = config.get_builder_cls()(config)
    config.finalize()
    first, last = groups.pp.rank() == 0, groups.pp.rank() == groups.pp.size() - 1
    with torch.device("meta"):
        return [builder.build_model(groups, first, last).to(config.transformer.params_dtype)]


def global_name(key: str, offset: tuple[int, ...], prepended: int) -> tuple[str, tuple[int, ...]]:
    """A checkpoint's key and offset -> name in the whole model (local layer spec) and offset in the full tensor.

    Megatron stacks the layers' tensors along an axis of their own, or counts the layers in the key.
    """
    assert prepended in (0, 1), (key, prepended)
    if prepended:
        key, offset = key.replace(_LAYERS, f"{_LAYERS}{offset[0]}.", 1), offset[1:]
    return local_spec_name(key), offset


class StreamingSave(TorchDistSaveShardedStrategy):
    """Megatron's save strategy with the values read on demand.

    Args:
        read: called once for every piece, in the checkpoint's order.
        wrote: called with the bytes of each piece after it was written.
    """

    def __init__(self, read: ReadPiece, wrote: Callable[[int], None]) -> None:
        super().__init__()
        self._read, self._wrote = read, wrote

    def save(self, sharded_state_dict: dict, checkpoint_dir: str | Path) -> None:
        """Write this rank's pieces; rank 0 writes the metadata too.

        Raises:
            what the first failing rank raised, on every rank.
        """
        parts = [part for part in nested_values(sharded_state_dict) if is_main_replica(part.replica_id)]
        try:
            dcp.save({}, storage_writer=_Writer(checkpoint_dir, self._wrote), planner=_Planner(parts, self._read))
        except CheckpointException as failed:
            raise next(iter(failed.failures.values()))[0] from failed


class _Planner(DefaultSavePlanner):
    """Plans the pieces of Megatron's sharded state dict, and reads one when it is written."""

    def __init__(self, parts: list, read: ReadPiece) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._read = read
        self._parts = {}
        for part in parts:
            key, offset = (part.unique_key, None) if isinstance(part, ShardedObject) else (part.key, part.global_offset)
            self._parts[key, offset] = part

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan([self._write_item(part) for part in self._parts.values()])
        return self.plan

    @staticmethod
    def _write_item(part: ShardedTensor | ShardedObject) -> WriteItem:
        if isinstance(part, ShardedObject):
            return WriteItem(MetadataIndex(part.unique_key), WriteItemType.BYTE_IO)
        offset = torch.Size(part.global_offset)
        chunk = ChunkStorageMetadata(offset, torch.Size((1,) * part.prepend_axis_num + tuple(part.local_shape)))
        data = TensorWriteData(chunk, TensorProperties(dtype=part.dtype), torch.Size(part.global_shape))
        return WriteItem(MetadataIndex(part.key, offset), WriteItemType.SHARD, tensor_data=data)

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        index = write_item.index
        part = self._parts[index.fqn, None if index.offset is None else tuple(index.offset)]
        if isinstance(part, ShardedObject):
            data = io.BytesIO()
            torch.save([part.data], data)  # a list of the key's objects on this rank, as Megatron reads it
            return data
        name, offset = global_name(part.key, part.global_offset, part.prepend_axis_num)
        piece = self._read(name, offset, tuple(part.local_shape), part.dtype)
        return piece.view(write_item.tensor_data.chunk.sizes)


class _Writer(FileSystemWriter):
    """One file a rank, one tensor in memory at a time."""

    def __init__(self, path: str | Path, wrote: Callable[[int], None]) -> None:
        super().__init__(path, sync_files=True)
        self._wrote = wrote

    def write_data(self, plan: SavePlan, planner: _Planner) -> Future[list[WriteResult]]:
        name = f"{plan.storage_data.prefix}0.distcp"
        results = []
        with _Stream(Path(self.path) / name) as stream:
            for item in plan.items:
                begin, data = stream.tell(), planner.resolve_data(item)
                if isinstance(data, io.BytesIO):
                    stream.write(data.getbuffer())
                else:
                    stream.save(data)
                    self._wrote(data.nbytes)
                length = stream.tell() - begin
                results.append(WriteResult(item.index, length, _StorageInfo(name, begin, length)))
        done: Future = Future()
        done.set_result(results)
        return done


class _Stream:
    """A file whose error is not lost on its way through torch's archive writer, which reports a position instead."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb", buffering=1 << 20)
        self._error: OSError | None = None

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        try:
            if kind is None:
                self._file.flush()
                os.fsync(self._file.fileno())
        finally:
            self._file.close()

    def tell(self) -> int:
        return self._file.tell()

    def write(self, data) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self._error = error
            raise

    def flush(self) -> None:
        """torch calls it after every tensor; the file is flushed once, at its end."""

    def save(self, tensor: Tensor) -> None:
        try:
            torch.save(tensor, self)
        except (OSError, RuntimeError) as failure:
            raise self._error or failure from failure
