import json

import pytest
import torch
import transformers
from safetensors import safe_open

from megatron_rpsd.checkpoint.families import hf_tensors
from megatron_rpsd.checkpoint.hf_folder import HFFolder
from megatron_rpsd.checkpoint.hf_writer import exported_config, write_hf_folder

KINDS = ["llama", "llama-tied", "llama-wide-heads", "qwen2", "qwen3", "mistral"]
# Six heads go over 2 and 3 ranks, but the KV groups must divide by the ranks or the other way round. With one group of
# (6 + 2) * 4 = 32 rows, three ranks could not share the rows.
REFUSED = {
    ("llama", 2): "num_query_groups=3",
    ("qwen3", 2): "num_query_groups=3",
    ("llama-wide-heads", 3): "num_query_groups=2",
    ("qwen2", 3): "num_query_groups=2",
    ("mistral", 3): "32 % 3 = 2",
}
SPLITS = [(kind, tp_size) for kind in KINDS for tp_size in (1, 2, 3) if (kind, tp_size) not in REFUSED]


def through_shards(folder: HFFolder, tp_size: int):
    """Every full tensor of the folder, split over tensor-parallel ranks and merged again."""
    dims = folder.dimensions()
    for mapped, full in folder.full_tensors():
        locals = [mapped.layout.split(full, tp_size, rank, dims, padded_vocab_size=102) for rank in range(tp_size)]
        yield mapped.megatron_name, mapped.layout.merge(locals, dims)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(40).reshape(2, 20) * 7 % 97).logits


def load(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


@pytest.mark.parametrize(("kind", "tp_size"), SPLITS)
def test_round_trip_gives_the_same_model(save_model, tmp_path, kind, tp_size):
    path, model = save_model(kind)
    folder = HFFolder(path)
    exported = dict(hf_tensors(through_shards(folder, tp_size), folder.dimensions()))
    assert sorted(exported) == folder.names()
    for name, tensor in exported.items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, model.state_dict()[name]), name
    base, scaling, length = folder.rope()
    config = exported_config(folder.config, base, scaling, length, torch.float32)
    write_hf_folder(tmp_path / "out", iter(exported.items()), config, path)
    reloaded = load(tmp_path / "out")
    assert type(reloaded) is type(model)
    assert torch.equal(logits(reloaded), logits(model))


@pytest.mark.parametrize(("case", "arithmetic"), REFUSED.items())
def test_impossible_split_is_refused(save_model, case, arithmetic):
    kind, tp_size = case
    with pytest.raises(ValueError, match=f"--tensor-model-parallel-size {tp_size}.*{arithmetic}"):
        list(through_shards(HFFolder(save_model(kind)[0]), tp_size))


def test_many_shards_and_bfloat16(save_model, tmp_path):
    path, _ = save_model("qwen2", dtype=torch.bfloat16)
    folder = HFFolder(path)
    config = exported_config(folder.config, 10000.0, None, 64, torch.bfloat16)
    tensors = hf_tensors(through_shards(folder, 2), folder.dimensions())
    write_hf_folder(tmp_path / "deep" / "out", tensors, config, path, max_shard_bytes=3000)
    out = tmp_path / "deep" / "out"
    files = sorted(file.name for file in out.glob("*.safetensors"))
    assert len(files) > 5 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == files
    stored = 0
    for file in files:
        with safe_open(out / file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            sizes = [opened.get_tensor(name).nbytes for name in opened.keys()]
            assert all(index["weight_map"][name] == file for name in opened.keys())
        assert sum(sizes) <= 3000 or len(sizes) == 1
        stored += sum(sizes)
    assert stored == index["metadata"]["total_size"]
    reloaded = load(out)
    # Not the model in memory: casting it rounded its rotary table too, which loading from a file does not.
    assert reloaded.dtype == torch.bfloat16 and torch.equal(logits(reloaded), logits(load(path)))


def test_companions_are_copied_and_code_is_not(save_model, tmp_path):
    path, _ = save_model("llama")
    (path / "additional_chat_templates").mkdir()
    copied = ["tokenizer.json", "chat_template.jinja", "LICENSE.txt", "additional_chat_templates/tool.jinja"]
    for name in [*copied, "modeling_custom.py", "pytorch_model.bin", "README.md"]:
        (path / name).write_text(f"content of {name}")
    folder = HFFolder(path)
    write_hf_folder(tmp_path / "out", ((name, folder.tensor(name)) for name in folder.names()), folder.config, path)
    written = {str(file.relative_to(tmp_path / "out")) for file in (tmp_path / "out").rglob("*") if file.is_file()}
    assert written == {"config.json", "model.safetensors", "generation_config.json", *copied}
    for name in copied:
        assert (tmp_path / "out" / name).read_text() == f"content of {name}"


def test_stream_may_reuse_its_buffer_and_pass_views(save_model, tmp_path):
    path, _ = save_model("llama")

    def reused():
        buffer = torch.zeros(4, 6)
        for index in range(3):
            yield f"whole.{index}", buffer.fill_(index)
            yield f"view.{index}", buffer.t()[::2]

    write_hf_folder(tmp_path / "out", reused(), {}, path)
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as opened:
        for index in range(3):
            assert torch.equal(opened.get_tensor(f"whole.{index}"), torch.full((4, 6), float(index)))
            assert torch.equal(opened.get_tensor(f"view.{index}"), torch.full((3, 4), float(index)))


def test_interrupted_write_leaves_nothing(save_model, tmp_path):
    path, _ = save_model("llama")
    before = set(tmp_path.iterdir())

    def broken():
        yield "first", torch.ones(100)
        yield "second", torch.ones(100)
        assert not (tmp_path / "out").exists()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_hf_folder(tmp_path / "out", broken(), {}, path, max_shard_bytes=400)
    assert set(tmp_path.iterdir()) == before


def test_existing_output_and_missing_reference_are_refused(save_model, tmp_path):
    path, _ = save_model("llama")
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="out exists already"):
        write_hf_folder(tmp_path / "out", iter([("a", torch.ones(1))]), {}, path)
    assert list((tmp_path / "out").iterdir()) == []
    with pytest.raises(ValueError, match="nowhere is not a folder"):
        write_hf_folder(tmp_path / "new", iter([("a", torch.ones(1))]), {}, tmp_path / "nowhere")


SCALINGS = {
    "none": None,
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
}


@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
def test_exported_config_reads_alike_in_both_generations(save_model, tmp_path, scaling):
    path, _ = save_model("llama")
    reference = HFFolder(path).config
    untouched = json.dumps(reference)
    config = exported_config(reference, 2e6, scaling, 256, torch.bfloat16)
    assert json.dumps(reference) == untouched
    # Before transformers 5: theta from one key, scaling from the other, and nothing else.
    assert (config["rope_theta"], config["rope_scaling"]) == (2e6, scaling)
    assert config["torch_dtype"] == config["dtype"] == "bfloat16"
    # transformers 5, from the file and from a file that holds the new schema alone.
    old_keys = ("rope_theta", "rope_scaling")
    for content in (config, {key: value for key, value in config.items() if key not in old_keys}):
        (tmp_path / "config.json").write_text(json.dumps(content))
        loaded = transformers.AutoConfig.from_pretrained(tmp_path)
        assert loaded.rope_parameters == {"rope_type": "default", **(scaling or {}), "rope_theta": 2e6}
        assert loaded.max_position_embeddings == 256
    (path / "config.json").write_text(json.dumps(config))
    assert HFFolder(path).rope() == (2e6, scaling, 256)


def test_old_schema_reference_and_stale_keys(save_model, edit_config, tmp_path):
    """A YaRN model saved by an old release: the length before scaling survives a longer declared length."""
    path, model = save_model("llama")
    edit_config(
        path, rope_parameters=..., rope_theta=10000.0, rope_scaling={"type": "yarn", "factor": 2.0}, auto_map={"a": "b"}
    )
    folder = HFFolder(path)
    base, scaling, _ = folder.rope()
    config = exported_config(folder.config, base, scaling, 512, torch.float32)
    assert "auto_map" not in config
    write_hf_folder(tmp_path / "out", ((name, folder.tensor(name)) for name in folder.names()), config, path)
    before, after = load(path), load(tmp_path / "out")
    assert torch.equal(after.model.rotary_emb.inv_freq, before.model.rotary_emb.inv_freq)
    assert torch.equal(logits(after), logits(before))
    assert not torch.equal(logits(after), logits(model))


def test_mistral_window_does_not_come_back(save_model, edit_config):
    path, _ = save_model("mistral")
    edit_config(path, sliding_window=64)
    assert exported_config(HFFolder(path).config, 1e4, None, 256, torch.float32)["sliding_window"] is None
