"""The safetensors format, one tensor at a time: read with every length checked, written at places known beforehand.

A file is 8 bytes (little-endian length of the header), the header (JSON: name -> dtype, shape, offsets), then the
tensors' bytes. Reading takes a tensor's bytes into memory of its own, so that a model much larger than memory passes
through; a memory map would keep every page that was touched.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_LARGEST_HEADER = 100_000_000  # bytes; the format's own bound
_ALIGNMENT = 8  # bytes at which the tensors start


class TensorSpec(NamedTuple):
    """A tensor without its values."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class StoredTensor(NamedTuple):
    """Where a tensor lies in a file: bytes [start, stop)."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file, by name.

    Raises:
        ValueError: the file is not whole or not in the format; the message has the arithmetic.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little") if size >= 8 else _LARGEST_HEADER + 1
        if length > min(_LARGEST_HEADER, size - 8):
            raise ValueError(
                f"{path} is not a readable safetensors file: it has {size} bytes, too few for its header; "
                "fetch it again"
            )
        raw = file.read(length)
    try:
        entries = json.loads(raw)
        entries.pop("__metadata__", None)
        stored = {name: _stored(entry, 8 + length) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a readable safetensors file: its header is damaged ({error})") from error
    end = max((tensor.stop for tensor in stored.values()), default=8 + length)
    if end != size:
        raise ValueError(
            f"{path} is not a readable safetensors file: its header describes {end} bytes, the file has {size}; "
            "fetch it again"
        )
    return stored


def _stored(entry: dict, data_start: int) -> StoredTensor:
    dtype, shape = entry["dtype"], tuple(entry["shape"])
    begin, end = entry["data_offsets"]
    if dtype not in _DTYPES:
        raise ValueError(f"dtype {dtype!r} is not known")
    if begin < 0 or any(size < 0 for size in shape) or end - begin != math.prod(shape) * _DTYPES[dtype].itemsize:
        raise ValueError(f"offsets {begin} to {end} do not fit shape {list(shape)} of {dtype}")
    return StoredTensor(_DTYPES[dtype], shape, data_start + begin, data_start + end)


def read_tensor(file_descriptor: int, stored: StoredTensor) -> Tensor:
    """The tensor's values, in memory of their own.

    Raises:
        ValueError: the file ends before the tensor does.
    """
    tensor = torch.empty(stored.shape, dtype=stored.dtype)
    view, done = _bytes_of(tensor), 0
    while done < len(view):
        count = os.preadv(file_descriptor, [view[done:]], stored.start + done)
        if count == 0:
            raise ValueError(f"the file ends {len(view) - done} bytes before the tensor does")
        done += count
    return tensor


def plan_file(specs: Sequence[TensorSpec]) -> tuple[bytes, dict[str, StoredTensor]]:
    """Header bytes and places of a new file's tensors.

    Larger dtypes come first, so that every tensor lies at a multiple of its element size.
    """
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    offset, relative = 0, {}
    for spec in sorted(specs, key=lambda spec: -spec.dtype.itemsize):
        begin, offset = offset, offset + spec.nbytes
        header[spec.name] = {"dtype": _NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [begin, offset]}
        relative[spec.name] = StoredTensor(spec.dtype, spec.shape, begin, offset)
    assert len(relative) == len(specs), "a tensor's name comes twice"
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    start = 8 + len(text)
    places = {
        name: place._replace(start=start + place.start, stop=start + place.stop) for name, place in relative.items()
    }
    return len(text).to_bytes(8, "little") + text, places


def write_tensor(file_descriptor: int, place: StoredTensor, tensor: Tensor) -> None:
    """Put a tensor's values at its place."""
    assert (tuple(tensor.shape), tensor.dtype) == (place.shape, place.dtype), (tensor.shape, tensor.dtype, place)
    write_all(file_descriptor, _bytes_of(tensor.detach().contiguous()), place.start)


def write_all(file_descriptor: int, data: bytes | memoryview, offset: int) -> None:
    """Write every byte of `data` at `offset`; the system may take fewer at a time.

    Raises:
        OSError: the device is full, among others.
    """
    view, done = memoryview(data), 0
    while done < len(view):
        done += os.pwrite(file_descriptor, view[done:], offset + done)


def _bytes_of(tensor: Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())
