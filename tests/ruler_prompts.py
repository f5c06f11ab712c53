"""A tokenizer that reads RULER's prompts in a few hundred tokens, tiny random models for it, and prepared prompts."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from megatron_rpsd.ruler.generate import write_task
from megatron_rpsd.ruler.tasks import NIAH_PREFIX, NIAH_TEMPLATE, NOISE, VT_PREFIX, VT_TEMPLATE, find_task

BOS = "<s>"
_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.3,  # large enough that positions and logits matter
}
_CONFIGS = {
    "llama": lambda sizes: LlamaConfig(tie_word_embeddings=True, head_dim=8, **sizes),
    "qwen2": lambda sizes: Qwen2Config(**sizes),
    "qwen3": lambda sizes: Qwen3Config(head_dim=16, **sizes),
    "mistral": lambda sizes: MistralConfig(sliding_window=None, head_dim=8, **sizes),
    "windowed": lambda sizes: MistralConfig(sliding_window=16, head_dim=8, **sizes),
}


def save_tokenizer(folder: Path, adds_bos: bool = False) -> Path:
    """Byte-level BPE of RULER's fixed texts; `adds_bos`: as Llama's, it puts a BOS before every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=[BOS], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([NOISE, NIAH_TEMPLATE, NIAH_PREFIX, VT_TEMPLATE, VT_PREFIX] * 3, trainer)
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=BOS).save_pretrained(folder)
    return folder


def tiny_reader(folder: Path, family: str = "llama", adds_bos: bool = False, seed: int = 1) -> Path:
    """A random model of `family` with that tokenizer, as a Hugging Face folder."""
    save_tokenizer(folder, adds_bos)
    vocabulary = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(_CONFIGS[family]({**_SIZES, "vocab_size": vocabulary}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:  # Qwen3's of queries larger, or attention would be near uniform
                parameter.uniform_(0.5, 1.5).mul_(2.0 if name.endswith("q_norm.weight") else 1.0)
    model.save_pretrained(folder)
    return folder


def make_prompts(folder: Path, tokenizer: Path, task: str, length: int, number: int) -> Path:
    """FOLDER/TASK-LENGTH.jsonl and its companions, as tools/make_ruler.py writes them."""
    output = folder / f"{task}-{length}.jsonl"
    write_task(find_task(task), length, number, 42, tokenizer, None, output)
    return output


def lines(path: Path) -> list[dict]:
    """The objects of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_prepared(path: Path, tokenizer: Path, task: str, samples: list[tuple[str, str, list[str]]]) -> Path:
    """A prepared file of given (input, answer prefix, outputs), as short as they are, with its manifest."""
    records = [{"index": 0, "input": text, "outputs": o, "answer_prefix": prefix} for text, prefix, o in samples]
    content = "".join(json.dumps(record) + "\n" for record in records).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    manifest = {
        "task": task,
        "tokenizer_sha256": hashlib.sha256((tokenizer / "tokenizer.json").read_bytes()).hexdigest(),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    path.with_suffix(".manifest.json").write_text(json.dumps(manifest))
    return path
