import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from megatron_rpsd.checkpoint.hf_source import HFSource, warn_unless_finite
from megatron_rpsd.checkpoint.safetensors_file import TensorSpec, plan_file, read_header, read_tensor, write_tensor

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
]  # fmt: skip


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    """One of every dtype, odd sizes, a scalar and an empty one."""
    made = {str(dtype): torch.arange(15).reshape(3, 5).to(dtype) for dtype in DTYPES}
    return {**made, "scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4)}


def test_safetensors_own_reader_reads_what_is_written(tmp_path, tensors):
    header, places = plan_file([TensorSpec(name, t.dtype, tuple(t.shape)) for name, t in tensors.items()])
    file = os.open(tmp_path / "ours", os.O_RDWR | os.O_CREAT, 0o644)
    for name in reversed(tensors):  # in any order
        write_tensor(file, places[name], tensors[name])
    os.pwrite(file, header, 0)
    os.close(file)
    with safe_open(tmp_path / "ours", framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}
        assert sorted(opened.keys()) == sorted(tensors)
        for name, tensor in tensors.items():
            assert opened.get_tensor(name).dtype == tensor.dtype
            assert torch.equal(opened.get_tensor(name).double(), tensor.double())
    assert all(place.start % place.dtype.itemsize == 0 for place in places.values())


def test_what_safetensors_writes_is_read(tmp_path, tensors):
    save_file(tensors, tmp_path / "theirs", metadata={"any": "thing"})
    header = read_header(tmp_path / "theirs")
    assert header.keys() == tensors.keys()
    with (tmp_path / "theirs").open("rb") as file:
        for name, tensor in tensors.items():
            read = read_tensor(file.fileno(), header[name])
            assert read.dtype == tensor.dtype and torch.equal(read.double(), tensor.double())


@pytest.mark.parametrize("keep", [0, 7, 30, -1])
def test_a_cut_file_is_refused_with_the_arithmetic(tmp_path, keep):
    save_file({"a": torch.ones(100)}, tmp_path / "file")
    whole = (tmp_path / "file").read_bytes()
    (tmp_path / "file").write_bytes(whole[:keep])
    with pytest.raises(ValueError, match=f"not a readable safetensors file.* {len(whole[:keep])}") as caught:
        read_header(tmp_path / "file")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [{"dtype": "F7"}, {"data_offsets": [-4, 396]}, {"shape": [99]}, {"data_offsets": [0]}, {"shape": None}],
)
def test_a_header_that_does_not_add_up_is_refused(tmp_path, change):
    entry = {"a": {"dtype": "F32", "shape": [100], "data_offsets": [0, 400], **change}}
    text = json.dumps(entry).encode()
    (tmp_path / "file").write_bytes(len(text).to_bytes(8, "little") + text + bytes(400))
    with pytest.raises(ValueError, match="its header is damaged"):
        read_header(tmp_path / "file")


def test_only_values_that_are_not_finite_are_warned_of(capsys):
    warn_unless_finite("fine", torch.full((1000,), 3e38))  # the sum overflows, the values do not
    warn_unless_finite("half", torch.full((100,), 6e4, dtype=torch.float16))
    assert capsys.readouterr().err == ""
    warn_unless_finite("broken", torch.tensor([1.0, float("nan"), float("inf"), -float("inf")]))
    assert capsys.readouterr().err == "warning: broken holds 1 NaN and 2 infinite values\n"


def test_pieces_are_cut_from_the_full_tensor_and_the_vocabulary_is_padded(save_model):
    from megatron_rpsd.checkpoint.hf_folder import HFFolder

    path, model = save_model("qwen2")
    source, state = HFSource(HFFolder(path)), model.state_dict()
    embedding = source.piece("embedding.word_embeddings.weight", (96, 0), (4, 24), torch.float32)
    assert torch.equal(embedding[0], state["model.embed_tokens.weight"][96]) and not embedding[1:].any()
    beyond = source.piece("embedding.word_embeddings.weight", (100, 0), (4, 24), torch.float32)
    assert beyond.shape == (4, 24) and not beyond.any()
    up = source.piece("decoder.layers.1.mlp.linear_fc1.weight", (36 + 18, 0), (18, 24), torch.float32)
    assert torch.equal(up, state["model.layers.1.mlp.up_proj.weight"][18:])
    down = source.piece("decoder.layers.1.mlp.linear_fc2.weight", (0, 12), (24, 12), torch.float64)
    assert torch.equal(down, state["model.layers.1.mlp.down_proj.weight"][:, 12:24].double()) and down.is_contiguous()
