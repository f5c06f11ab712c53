"""Conversion at every layout: bitwise round trips, Megatron's own reading, logits, and what a kill leaves behind."""

from __future__ import annotations

import functools
import json
import random
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from megatron_rpsd.checkpoint.convert import ImportLayout, different_tensors, export_hf, import_hf
from megatron_rpsd.evaluation.logits import megatron_logits, transformers_logits
from tests.distributed import conversion_job
from tests.distributed.pool import _context

SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
CONFIGS = {
    "llama3-tied": lambda: LlamaConfig(tie_word_embeddings=True, rope_parameters=LLAMA3, **SIZES),
    "llama2": lambda: LlamaConfig(tie_word_embeddings=False, **{**SIZES, "num_key_value_heads": 4}),
    "qwen2": lambda: Qwen2Config(tie_word_embeddings=True, **SIZES),
    "qwen3": lambda: Qwen3Config(tie_word_embeddings=False, head_dim=16, **SIZES),
    "mistral": lambda: MistralConfig(tie_word_embeddings=False, sliding_window=None, head_dim=8, **SIZES),
}
CASES = [  # family, layout of the import, flags of another layout that Megatron loads it at
    ("llama3-tied", ImportLayout(2, 2), ["--pipeline-model-parallel-size", "2"]),
    ("llama3-tied", ImportLayout(1, 2, first_stage_layers=3), ["--tensor-model-parallel-size", "2"]),
    ("llama2", ImportLayout(2, 1), ["--pipeline-model-parallel-size", "2"]),
    ("qwen2", ImportLayout(2, 1), []),
    ("qwen3", ImportLayout(1, 2), ["--tensor-model-parallel-size", "2"]),
    ("mistral", ImportLayout(2, 2, last_stage_layers=1), ["--tensor-model-parallel-size", "2"]),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """model(family) -> a random model's folder, norms and biases random too, in two files."""
    root, made = tmp_path_factory.mktemp("models"), {}

    def make(family: str) -> Path:
        if family not in made:
            torch.manual_seed(3)
            network = AutoModelForCausalLM.from_config(CONFIGS[family]())
            with torch.no_grad():
                for name, parameter in network.named_parameters():
                    if "norm" in name or name.endswith("bias"):
                        parameter.uniform_(0.5, 1.5)
            made[family] = root / family
            network.save_pretrained(made[family], max_shard_size="50KB")
        return made[family]

    return make


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder, by safetensors' own reader."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_equal_folders(left: Path, right: Path) -> None:
    first, second = stored(left), stored(right)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype and torch.equal(tensor, second[name]), name


@pytest.mark.parametrize(("family", "layout", "flags"), CASES)
def test_a_round_trip_is_bitwise_and_megatron_reads_the_same(family, layout, flags, ranks, model, tmp_path):
    hf, checkpoint, world = model(family), tmp_path / "checkpoint", 1 + bool(flags)
    size = layout.tensor_model_parallel_size * layout.pipeline_model_parallel_size
    ranks.run(size, import_hf, hf, checkpoint, "cpu", layout)
    assert len(list((checkpoint / "release").glob("*.distcp"))) == size
    answers = ranks.run(world, conversion_job.parameters_that_differ, hf, checkpoint, flags)
    assert all(count > 0 and different == [] for count, different in answers)
    ranks.run(world, export_hf, checkpoint, hf, tmp_path / "hf", 40_000)  # one and two ranks write the files
    assert_equal_folders(hf, tmp_path / "hf")
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {"checkpoint", "hf"}


def test_an_exported_folder_is_laid_out_as_its_readers_expect(ranks, model, tmp_path):
    hf = model("llama3-tied")
    ranks.run(1, import_hf, hf, tmp_path / "checkpoint")
    ranks.run(1, export_hf, tmp_path / "checkpoint", hf, tmp_path / "hf", 40_000)
    out = tmp_path / "hf"
    names = sorted(path.name for path in out.iterdir())
    shards = [name for name in names if name.endswith(".safetensors")]
    assert len(shards) > 2 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert set(names) - set(shards) == {"config.json", "generation_config.json", "model.safetensors.index.json"}
    index = json.loads((out / "model.safetensors.index.json").read_text())
    for shard in shards:
        with safe_open(out / shard, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
            assert {index["weight_map"][name] for name in file.keys()} == {shard}
            assert sum(file.get_tensor(name).nbytes for name in file.keys()) <= 40_000 or len(file.keys()) == 1
        assert (out / shard).stat().st_mode & 0o044  # others may read it, as the umask of a usual account says
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["torch_dtype"] == "float32"


def test_logits_past_the_original_window_equal_transformers(ranks, model, tmp_path):
    hf = model("llama3-tied")
    ranks.run(2, import_hf, hf, tmp_path / "checkpoint", "cpu", ImportLayout(2))
    ranks.run(1, export_hf, tmp_path / "checkpoint", hf, tmp_path / "hf")
    tokens = np.random.default_rng(0).integers(0, 97, 60)  # the window before scaling is 16
    ours = ranks.run(1, megatron_logits, tmp_path / "checkpoint", hf, tokens)[0]
    for folder in (hf, tmp_path / "hf"):
        theirs = transformers_logits(folder, tokens)
        assert np.abs(theirs).max() > 1 and np.abs(ours - theirs).max() < 1e-4
    assert 0 < np.abs(ours - theirs).max()  # two libraries' arithmetic, not one compared with itself


def test_a_cast_rounds_once_and_comes_back_as_it_is(ranks, model, tmp_path):
    hf = model("qwen3")
    ranks.run(2, import_hf, hf, tmp_path / "checkpoint", "cpu", ImportLayout(2), torch.bfloat16)
    ranks.run(1, export_hf, tmp_path / "checkpoint", hf, tmp_path / "hf")
    exported = stored(tmp_path / "hf")
    for name, tensor in stored(hf).items():
        assert torch.equal(exported[name], tensor.bfloat16()), name
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "bfloat16"
    compared, different = ranks.run(1, different_tensors, hf, tmp_path / "checkpoint")[0]
    assert len(different) == compared  # bf16 is not what is stored in fp32
    assert ranks.run(1, different_tensors, hf, tmp_path / "checkpoint", None, torch.bfloat16)[0] == (compared, [])


def test_a_checkpoint_in_the_middle_of_a_run_is_exported_by_its_number(ranks, model, tmp_path):
    older, newest, run = model("qwen3"), tmp_path / "newest", tmp_path / "run"
    shutil.copytree(older, newest)
    for file in newest.glob("*.safetensors"):
        save_file({name: -tensor for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    for hf, iteration in ((older, 3), (newest, 5)):
        ranks.run(1, import_hf, hf, tmp_path / f"checkpoint{iteration}")
        shutil.copytree(tmp_path / f"checkpoint{iteration}" / "release", run / f"iter_{iteration:07d}")
    (run / "latest_checkpointed_iteration.txt").write_text("5")
    ranks.run(1, export_hf, run, older, tmp_path / "hf5")
    ranks.run(1, functools.partial(export_hf, iteration=3), run, older, tmp_path / "hf3")
    assert_equal_folders(newest, tmp_path / "hf5")
    assert_equal_folders(older, tmp_path / "hf3")


def test_smollm2_comes_back_from_three_ranks(ranks, smollm2, tmp_path):
    """49,152 tokens and 9 query heads over 3 ranks; imported at TP 3, exported by one process."""
    ranks.run(3, import_hf, smollm2, tmp_path / "checkpoint", "cpu", ImportLayout(3))
    ranks.run(1, export_hf, tmp_path / "checkpoint", smollm2, tmp_path / "hf")
    assert_equal_folders(smollm2, tmp_path / "hf")
    for name in ("tokenizer.json", "generation_config.json"):
        assert (tmp_path / "hf" / name).read_bytes() == (smollm2 / name).read_bytes()


def test_the_benchmark_reports_every_way_beside_the_copy(ranks, model, tmp_path):
    hf = model("llama2")
    result = ranks.run(1, conversion_job.benchmark, hf, tmp_path / "scratch")[0]
    assert set(result["seconds"]) == set(result["peak_bytes"]) == {"copy", "import", "export"}
    assert result["ratio"]["import"] == result["seconds"]["import"] / result["seconds"]["copy"] > 0
    assert result["model_bytes"] == sum(tensor.nbytes for tensor in stored(hf).values())
    assert result["largest_tensor_bytes"] == max(tensor.nbytes for tensor in stored(hf).values())
    assert list((tmp_path / "scratch").iterdir()) == []


def killed_at_random(direction: str, times: int, hf: Path, checkpoint: Path, folder: Path) -> int:
    """Kill a conversion at random moments, then let one finish; how many kills met a partial folder."""
    draws, met = random.Random(f"{direction} {times}"), 0
    for attempt in range(times):
        output = folder / f"{direction}{attempt}"
        process = _context.Process(target=conversion_job.slowly, args=(direction, hf, checkpoint, output))
        process.start()
        deadline = time.monotonic() + 300  # a crowded machine starts a process slowly
        while process.is_alive() and not list(folder.glob(f".{output.name}.partial-*")) and not output.exists():
            assert time.monotonic() < deadline
            time.sleep(0.001)
        if attempt:  # the writing takes about 0.4 s or less: some kills come after the rename, the first one never
            time.sleep(draws.uniform(0, 0.6))
        process.kill()
        process.join()
        met += bool(list(folder.glob(f".{output.name}.partial-*")))
        if not output.exists():
            again = _context.Process(target=conversion_job.slowly, args=(direction, hf, checkpoint, output))
            again.start()
            again.join(timeout=120)
            assert again.exitcode == 0
        assert not list(folder.glob(f".{output.name}.partial-*"))
    return met


def check_kills(times: int, ranks, model, tmp_path: Path) -> None:
    hf, checkpoint = model("llama3-tied"), tmp_path / "checkpoint"
    ranks.run(1, import_hf, hf, checkpoint)
    met = [killed_at_random(way, times, hf, checkpoint, tmp_path) for way in ("import", "export")]
    assert min(met) > 0  # kills that came too late prove nothing
    for attempt in range(times):
        assert_equal_folders(hf, tmp_path / f"export{attempt}")
        assert ranks.run(1, different_tensors, hf, tmp_path / f"import{attempt}")[0][1] == []
    assert all(not path.name.startswith(".") for path in tmp_path.iterdir())


def test_a_killed_conversion_looks_unfinished_and_a_rerun_completes(ranks, model, tmp_path):
    check_kills(3, ranks, model, tmp_path)


@pytest.mark.slow
def test_twenty_kills(ranks, model, tmp_path, record_property):
    record_property("tried", 2 * 20)  # imports and exports
    check_kills(20, ranks, model, tmp_path)
    record_property("held", 2 * 20)
