"""Damaged folders and full disks: one clear line, exit code 2, nothing left behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.distributed import conversion_job
from tests.distributed.models import tiny_model
from tests.distributed.pool import RankPool

INDEX = "model.safetensors.index.json"
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Path:
    """A tiny model in several files."""
    from transformers import AutoModelForCausalLM

    root = tmp_path_factory.mktemp("models")
    network = AutoModelForCausalLM.from_pretrained(tiny_model(root / "one", "llama"))
    network.save_pretrained(root / "many", max_shard_size="40KB")
    assert len(list((root / "many").glob("*.safetensors"))) > 2
    return root / "many"


@pytest.fixture(scope="module")
def checkpoint(sharded, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("checkpoints") / "one"
    code, text, error = run("import", "--hf", sharded, "--output", output)
    assert (code, error) == (0, ""), error
    assert text.startswith("imported ")
    return output


def run(*words, **options) -> tuple[int, str, str]:
    return RankPool().run(1, conversion_job.command, [str(word) for word in words], *options.values())[0]


def refused(answer: tuple[int, str, str], *parts: str) -> None:
    code, _, error = answer
    assert code == 2, answer
    assert len(error.splitlines()) == 1 and error.startswith("error: "), error
    for part in parts:
        assert part in error


def edit_json(path: Path, change) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def shard_of(folder: Path, name: str) -> Path:
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][name]


def edit_tensors(file: Path, change) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def truncated(folder: Path) -> None:
    file = shard_of(folder, UP)
    file.write_bytes(file.read_bytes()[:-100])


def moved_in_the_index(folder: Path) -> None:
    other = next(file for file in folder.glob("*.safetensors") if file != shard_of(folder, UP))
    edit_json(folder / INDEX, lambda index: index["weight_map"].update({UP: other.name}))


def unknown_tensor(folder: Path) -> None:
    file, bias = shard_of(folder, UP), "model.layers.1.mlp.up_proj.bias"
    edit_tensors(file, lambda tensors: tensors.update({bias: torch.ones(48)}))
    edit_json(folder / INDEX, lambda index: index["weight_map"].update({bias: file.name}))


def missing_tensor(folder: Path) -> None:
    edit_tensors(shard_of(folder, UP), lambda tensors: tensors.pop(UP))
    edit_json(folder / INDEX, lambda index: index["weight_map"].pop(UP))


def large_tokenizer(folder: Path) -> None:
    vocabulary = {f"t{index}": index for index in range(97)}
    added = [{"id": 97, "content": "<one>"}, {"id": 98, "content": "<two>"}]
    tokenizer = {"model": {"type": "WordLevel", "vocab": vocabulary}, "added_tokens": added}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def only_a_pickle(folder: Path) -> None:
    for file in [*folder.glob("*.safetensors"), folder / INDEX]:
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"never read")


FAULTS = {
    "truncated": (truncated, ["model-0000", "its header describes", "bytes, the file has"]),
    "moved": (moved_in_the_index, [INDEX, "does not hold " + UP]),
    "missing_shard": (lambda folder: shard_of(folder, UP).unlink(), [INDEX, "which is not in the folder"]),
    "missing_tensor": (missing_tensor, ["lacks 1 tensor(s)", UP]),
    "unknown_tensor": (unknown_tensor, ["model.layers.1.mlp.up_proj.bias", "would lose"]),
    "tokenizer": (large_tokenizer, ["tokenizer.json has 99 tokens", "vocab_size of 97", "2 tokens"]),
    "pickle": (only_a_pickle, ["pytorch_model.bin", "pickles are never read"]),
    "outside": (
        lambda folder: edit_json(folder / INDEX, lambda index: index["weight_map"].update({UP: "../x.safetensors"})),
        ["../x.safetensors", "not the name of a safetensors file inside the folder"],
    ),
    "experts": (
        lambda folder: edit_json(folder / "config.json", lambda c: c.update(architectures=["MixtralForCausalLM"])),
        ["MixtralForCausalLM", "mixture-of-experts models do not convert"],
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_folder_is_refused_before_anything_is_written(fault, sharded, tmp_path):
    damage, parts = FAULTS[fault]
    shutil.copytree(sharded, tmp_path / "hf")
    damage(tmp_path / "hf")
    refused(run("import", "--hf", tmp_path / "hf", "--output", tmp_path / "out"), *parts)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize("direction", ["import", "export"])
@pytest.mark.parametrize(
    ("limit", "reason"),
    [
        ({"file_bytes": None, "full_after": 30_000}, "no space left on the device"),
        ({"file_bytes": 20_000}, "takes no files of this size"),  # the kernel's own refusal
    ],
)
def test_a_full_disk_is_one_line_and_leaves_nothing(direction, limit, reason, sharded, checkpoint, tmp_path):
    words = ["--hf", sharded] if direction == "import" else ["--checkpoint", checkpoint, "--hf-reference", sharded]
    refused(run(direction, *words, "--output", tmp_path / "out", **limit), f"--output {tmp_path / 'out'}", reason)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("file", "bytes_kept"), [("__0_0.distcp", 30_000), (".metadata", 100)])
def test_a_damaged_checkpoint_is_refused(file, bytes_kept, sharded, checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "checkpoint")
    damaged = tmp_path / "checkpoint" / "release" / file
    damaged.write_bytes(damaged.read_bytes()[:bytes_kept])
    words = ["--checkpoint", tmp_path / "checkpoint", "--hf-reference", sharded, "--output", tmp_path / "out"]
    refused(run("export", *words), "release", "damaged")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_values_that_are_not_finite_are_named_and_converted(sharded, tmp_path):
    shutil.copytree(sharded, tmp_path / "hf")

    def spoil(tensors) -> None:
        tensors[UP][3, 4], tensors[UP][5] = float("nan"), float("inf")

    edit_tensors(shard_of(tmp_path / "hf", UP), spoil)
    code, _, error = run("import", "--hf", tmp_path / "hf", "--output", tmp_path / "out")
    assert (code, error) == (0, f"warning: {UP} holds 1 NaN and 32 infinite values\n")
    code, text, _ = run("verify", "--hf", tmp_path / "hf", "--checkpoint", tmp_path / "out")
    assert code == 0 and "tensors that differ, bit by bit  0" in text


def test_a_difference_is_exit_code_1_in_a_table(sharded, checkpoint, tmp_path):
    shutil.copytree(sharded, tmp_path / "hf")
    edit_tensors(shard_of(tmp_path / "hf", UP), lambda tensors: tensors[UP].view(-1)[7:8].neg_())
    for other in (["--checkpoint", checkpoint], ["--hf-exported", sharded]):
        code, text, error = run("verify", "--hf", tmp_path / "hf", *other)
        assert (code, error) == (1, "")
        assert "bit by bit  1" in text and UP in text and "DIFFERENT" in text


def test_equal_tensors_with_another_rope_are_found_by_the_next_tokens(sharded, checkpoint, tmp_path):
    """Every tensor agrees; only the logits see that config.json turns the positions at another base."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"t{index}": index for index in range(97)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    shutil.copytree(sharded, tmp_path / "hf")
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path / "hf")
    prompt = " ".join(f"t{index * 7 % 97}" for index in range(50))
    command = ["verify", "--hf", tmp_path / "hf", "--checkpoint", checkpoint, "--prompt", prompt]
    code, text, _ = run(*command)
    assert code == 0, text
    assert "prompt, tokens                   50" in text and "next tokens that agree           100.00%" in text
    edit_json(tmp_path / "hf" / "config.json", lambda config: config["rope_parameters"].update(rope_theta=100.0))
    code, text, _ = run(*command)
    assert code == 1, text
    assert "bit by bit  0" in text and "100.00%" not in text and "DIFFERENT" in text


BAD_COMMANDS = {
    "ranks": (
        ["import", "--hf", "{hf}", "--output", "{out}", "--tensor-model-parallel-size", "2"],
        ["torchrun", "= 2"],
    ),
    "iteration": (
        ["export", "--checkpoint", "{ck}", "--hf-reference", "{hf}", "--output", "{out}", "--iteration", "7"],
        ["--iteration 7", "release"],
    ),
    "no_iteration": (["verify", "--hf", "{hf}", "--hf-exported", "{hf}", "--iteration", "7"], ["--iteration 7"]),
    "no_tokenizer": (["verify", "--hf", "{hf}", "--checkpoint", "{ck}", "--prompt", "x"], ["--prompt", "tokenizer"]),
    "yarn": (
        ["export", "--checkpoint", "{ck}", "--hf-reference", "{hf}", "--output", "{out}", "--yarn-factor", "0.5"],
        ["--yarn-factor 0.5"],
    ),
    "shard": (
        ["export", "--checkpoint", "{ck}", "--hf-reference", "{hf}", "--output", "{out}", "--max-shard-gigabytes", "0"],
        ["--max-shard-gigabytes 0"],
    ),
}


@pytest.mark.parametrize("case", BAD_COMMANDS)
def test_a_command_that_cannot_run_is_one_line(case, sharded, checkpoint, tmp_path):
    words, parts = BAD_COMMANDS[case]
    places = {"hf": sharded, "ck": checkpoint, "out": tmp_path / "out"}
    refused(run(*(word.format(**places) for word in words)), *parts)
    assert list(tmp_path.iterdir()) == []
