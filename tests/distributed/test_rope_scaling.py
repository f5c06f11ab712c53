"""RoPE when the window grows: a checkpoint's scaling is kept, replaced or dropped, and the export says which."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoConfig

from megatron_rpsd.checkpoint.convert import export_hf, import_hf
from megatron_rpsd.evaluation.logits import megatron_logits, transformers_logits
from tests.distributed import training_job
from tests.distributed.corpus import run_arguments, write_corpus
from tests.distributed.models import LENGTH, VOCABULARY, tiny_model

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
CASES = {  # typed --rope-parameters, scaling of the exported model
    "kept": (None, LLAMA3),
    "replaced": (YARN, YARN),
    "old_key": ({"type": "linear", "factor": 4.0, "rope_theta": 500000}, {"rope_type": "linear", "factor": 4.0}),
    "dropped": ({"rope_type": "default"}, None),
}  # fmt: skip


@pytest.fixture(scope="module")
def scaled_llama(tmp_path_factory) -> Path:
    """A tiny Llama whose config scales RoPE as Llama 3.1 does."""
    folder = tiny_model(tmp_path_factory.mktemp("models") / "scaled", "llama")
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = {**LLAMA3, "rope_theta": 10000.0}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def adapted(ranks, scaled_llama, tmp_path_factory):
    """Two steps at a raised base in a window of 128, exported: (run, exported folder, first step's loss)."""
    root = tmp_path_factory.mktemp("adapted")
    ranks.run(1, import_hf, scaled_llama, root / "checkpoint")
    prefix = write_corpus(root / "random")

    @functools.cache
    def run(case: str) -> tuple[Path, Path, float]:
        typed, _ = CASES[case]
        folder = root / case
        arguments = [*run_arguments(root / "checkpoint", prefix, 2), "--save", str(folder / "run")]
        arguments += ["--save-interval", "2", "--rotary-base", "500000", "--max-position-embeddings", "128"]
        arguments += [] if typed is None else ["--rope-parameters", json.dumps(typed)]
        output = ranks.run(1, training_job.train, arguments)[0]
        ranks.run(1, export_hf, folder / "run", scaled_llama, folder / "hf")
        loss = re.search(r"iteration +1/.*lm loss: ([-+\d.E]+)", output)[1]
        return folder / "run", folder / "hf", float(loss)

    return run


@pytest.mark.parametrize("case", CASES)
def test_the_export_carries_the_rope_that_was_trained(case, adapted, ranks, scaled_llama):
    run, exported, _ = adapted(case)
    scaling = CASES[case][1]
    config = json.loads((exported / "config.json").read_text())
    assert config["max_position_embeddings"] == 128
    assert (config["rope_theta"], config["rope_scaling"]) == (500000, scaling)  # what transformers before 5 reads
    assert config["rope_parameters"] == {"rope_type": "default", **(scaling or {}), "rope_theta": 500000}
    assert AutoConfig.from_pretrained(exported).rope_parameters["rope_theta"] == 500000
    tokens = np.arange(LENGTH) * 7 % VOCABULARY
    ours = ranks.run(1, megatron_logits, run, scaled_llama, tokens)[0]  # by the arguments that the run saved
    theirs = transformers_logits(exported, tokens)  # by the exported config.json
    assert np.abs(ours - theirs).max() < 1e-4
    assert np.abs(ours).max() > 1


def test_what_is_typed_reaches_the_training(adapted):
    """The first step's loss, before any update, is that of four models."""
    assert len({adapted(case)[2] for case in CASES}) == len(CASES)


def test_an_export_with_yarn_reads_alike_everywhere_beyond_its_window(ranks, tmp_path):
    """Another framework's YaRN on the same weights; and our own import of the export, past the old window."""
    import torch
    from transformers import AutoModelForCausalLM

    original = tiny_model(tmp_path / "original", "llama")
    window = json.loads((original / "config.json").read_text())["max_position_embeddings"]
    ranks.run(1, import_hf, original, tmp_path / "checkpoint")
    ranks.run(1, functools.partial(export_hf, yarn_factor=3.0), tmp_path / "checkpoint", original, tmp_path / "yarn")
    ranks.run(1, import_hf, tmp_path / "yarn", tmp_path / "again")

    config = AutoConfig.from_pretrained(original)
    config.rope_parameters |= {"rope_type": "yarn", "factor": 3.0, "original_max_position_embeddings": window}
    config.max_position_embeddings = 3 * window
    tokens = np.arange(window + window // 2) * 7 % VOCABULARY
    oracle = AutoModelForCausalLM.from_pretrained(original, config=config, dtype=torch.float32)
    with torch.no_grad():
        meant = oracle(torch.as_tensor(tokens)[None]).logits[0].numpy()

    assert json.loads((tmp_path / "yarn" / "config.json").read_text())["max_position_embeddings"] == 3 * window
    assert np.abs(transformers_logits(tmp_path / "yarn", tokens) - meant).max() < 1e-6
    assert np.abs(ranks.run(1, megatron_logits, tmp_path / "again", tmp_path / "yarn", tokens)[0] - meant).max() < 1e-4
    assert np.abs(transformers_logits(original, tokens) - meant).max() > 1e-2  # without YaRN it is another model
