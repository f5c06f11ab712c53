import json
import os

import pytest
import torch
import transformers
from safetensors import safe_open

from megatron_rpsd.checkpoint.families import hf_tensors
from megatron_rpsd.checkpoint.hf_folder import HFFolder
from megatron_rpsd.checkpoint.hf_writer import Source, exported_config, with_yarn, write_hf_folder
from megatron_rpsd.checkpoint.safetensors_file import TensorSpec

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


def sources(tensors) -> list[Source]:
    """One source per (name, tensor)."""
    return [
        Source([TensorSpec(name, tensor.dtype, tuple(tensor.shape))], lambda tensor=tensor: [tensor])
        for name, tensor in tensors
    ]


def folder_sources(folder: HFFolder) -> list[Source]:
    return sources((name, folder.tensor(name)) for name in folder.names())


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
    write_hf_folder(tmp_path / "out", sources(exported.items()), config, path)
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
    write_hf_folder(tmp_path / "deep" / "out", sources(tensors), config, path, max_shard_bytes=3000)
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
    write_hf_folder(tmp_path / "out", folder_sources(folder), folder.config, path)
    written = {str(file.relative_to(tmp_path / "out")) for file in (tmp_path / "out").rglob("*") if file.is_file()}
    assert written == {"config.json", "model.safetensors", "generation_config.json", *copied}
    for name in copied:
        assert (tmp_path / "out" / name).read_text() == f"content of {name}"


def test_a_source_is_read_once_and_after_the_one_before_it_was_written(save_model, tmp_path):
    path, _ = save_model("llama")
    calls = []
    buffer = torch.zeros(4, 6)

    def read(index: int) -> list[torch.Tensor]:
        calls.append(index)
        return [buffer.fill_(index), buffer.t()[::2]]  # the same memory again, and a view of it

    specs = [
        [TensorSpec(f"whole.{index}", torch.float32, (4, 6)), TensorSpec(f"view.{index}", torch.float32, (3, 4))]
        for index in range(3)
    ]
    write_hf_folder(tmp_path / "out", [Source(spec, lambda n=n: read(n)) for n, spec in enumerate(specs)], {}, path)
    assert calls == [0, 1, 2]
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as opened:
        for index in range(3):
            assert torch.equal(opened.get_tensor(f"whole.{index}"), torch.full((4, 6), float(index)))
            assert torch.equal(opened.get_tensor(f"view.{index}"), torch.full((3, 4), float(index)))


def test_files_follow_the_umask(save_model, tmp_path):
    path, _ = save_model("llama")
    before = os.umask(0o027)
    try:
        write_hf_folder(tmp_path / "out", folder_sources(HFFolder(path)), {}, path)
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "out").iterdir()} == {0o640}


def test_interrupted_write_leaves_nothing(save_model, tmp_path):
    path, _ = save_model("llama")
    before = set(tmp_path.iterdir())

    def broken() -> list[torch.Tensor]:
        assert not (tmp_path / "out").exists()
        raise KeyboardInterrupt

    first, second = sources([("first", torch.ones(100)), ("second", torch.ones(100))])
    with pytest.raises(KeyboardInterrupt):
        write_hf_folder(tmp_path / "out", [first, second._replace(read=broken)], {}, path, max_shard_bytes=400)
    assert set(tmp_path.iterdir()) == before


def test_existing_output_and_missing_reference_are_refused(save_model, tmp_path):
    path, _ = save_model("llama")
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="out exists already"):
        write_hf_folder(tmp_path / "out", sources([("a", torch.ones(1))]), {}, path)
    assert list((tmp_path / "out").iterdir()) == []
    with pytest.raises(ValueError, match="nowhere is not a folder"):
        write_hf_folder(tmp_path / "new", sources([("a", torch.ones(1))]), {}, tmp_path / "nowhere")


def test_yarn_reads_as_transformers_means_it(save_model, tmp_path):
    path, _ = save_model("llama")
    scaling, length = with_yarn(None, 64, 4.0)
    config = exported_config(HFFolder(path).config, 5e5, scaling, length, torch.float32)
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = transformers.AutoConfig.from_pretrained(tmp_path)
    assert loaded.max_position_embeddings == 256
    assert loaded.rope_parameters == {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 5e5
    }  # fmt: skip
    rope = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(loaded)
    plain = 5e5 ** (-torch.arange(0, 4, 2) / 4)
    assert torch.equal(rope.inv_freq[:1], plain[:1])  # the fastest pair turns as before
    assert rope.inv_freq[-1] < plain[-1]  # the slowest is slowed down


@pytest.mark.parametrize(
    ("scaling", "factor", "words"),
    [
        ({"rope_type": "llama3", "factor": 8.0}, 4.0, "--yarn-factor 4: the model was trained with rope_type 'llama3'"),
        (None, 1.0, "--yarn-factor 1 must be"),
        (None, float("nan"), "--yarn-factor nan must be"),
    ],
)
def test_yarn_on_top_of_a_scaling_or_without_a_factor_is_refused(scaling, factor, words):
    with pytest.raises(ValueError, match=words):
        with_yarn(scaling, 64, factor)


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
    write_hf_folder(tmp_path / "out", folder_sources(folder), config, path)
    before, after = load(path), load(tmp_path / "out")
    assert torch.equal(after.model.rotary_emb.inv_freq, before.model.rotary_emb.inv_freq)
    assert torch.equal(logits(after), logits(before))
    assert not torch.equal(logits(after), logits(model))


def test_mistral_window_does_not_come_back(save_model, edit_config):
    path, _ = save_model("mistral")
    edit_config(path, sliding_window=64)
    assert exported_config(HFFolder(path).config, 1e4, None, 256, torch.float32)["sliding_window"] is None
