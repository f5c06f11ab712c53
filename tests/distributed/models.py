"""Tiny random models, samples, and what transformers and the written-out objective make of them in fp64."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from megatron_rpsd.loss.definitions import objective
from megatron_rpsd.positions import View

VOCABULARY = 97
LENGTH = 32

_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,  # large enough that positions and logits matter
}
_CONFIGS = {
    "llama": lambda: LlamaConfig(tie_word_embeddings=True, head_dim=8, **_SIZES),
    "qwen2": lambda: Qwen2Config(tie_word_embeddings=False, **_SIZES),
    "qwen3": lambda: Qwen3Config(tie_word_embeddings=False, head_dim=16, **_SIZES),
}


def tiny_model(folder: Path, family: str) -> Path:
    """A random model of `family`, saved as a Hugging Face folder; norms and biases random too."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(_CONFIGS[family]())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    return folder


def samples(count: int, masked: bool) -> dict[str, torch.Tensor]:
    """Random sequences; `masked` hides a third of the tokens, and the whole last quarter of the first sequence."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(0, VOCABULARY, (count, LENGTH + 1), generator=generator)
    mask = torch.ones(count, LENGTH)
    if masked:
        mask = (torch.rand(count, LENGTH, generator=generator) > 0.33).float()
        mask[0, -LENGTH // 4 :] = 0
    return {"tokens": ids[:, :-1], "labels": ids[:, 1:], "loss_mask": mask}


def split_in_every_chunk(chunks: int = 8) -> list[View]:
    """One view per zigzag chunk of CP 4, each with its own shift; the first one's suffix lies in the masked quarter."""
    size = LENGTH // chunks
    views = [View(split=chunk * size + chunk % size, shift=3 + 5 * chunk) for chunk in range(chunks)]
    return [View(split=LENGTH - 3, shift=7), *views[1:]]


def causal_mask(length: int) -> torch.Tensor:
    """Additive 4D mask in the sequence's order; without it transformers cuts a view where positions jump."""
    return torch.full((length, length), float("-inf"), dtype=torch.float64).triu(1)[None, None]


def reference(
    folder: Path, sample: dict[str, torch.Tensor], views: list[View], name: str, kl_weight: float
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Losses and gradients by transformers in fp64 with explicit position_ids, and the written-out objective."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").double()
    length = sample["tokens"].shape[1]
    mask = causal_mask(length).expand(len(views), -1, -1, -1)
    standard_ids = torch.arange(length).expand(len(views), -1)
    perturbed_ids = torch.stack([view.position_ids(length) for view in views])

    def logits(position_ids):
        return model(input_ids=sample["tokens"], position_ids=position_ids, attention_mask=mask).logits

    splits = torch.tensor([view.split for view in views])
    first = logits(perturbed_ids if name == "pose" else standard_ids)
    second = logits(perturbed_ids) if name in ("rpsd", "hard-label") else first
    labels, mask = sample["labels"], sample["loss_mask"]
    total, clm, kl = objective(first, second, labels, mask, splits, 0.0 if name == "hard-label" else kl_weight)
    if name == "hard-label":  # as the KL: each sequence's mean over its kept suffix tokens, sequences weighed by N
        again = torch.nn.functional.cross_entropy(second.transpose(1, 2), labels, reduction="none")
        for row, split in enumerate(splits):
            kept = mask[row, split:].sum().clamp(min=1)
            suffix = (again[row, split:] * mask[row, split:]).sum() / kept
            total = total + kl_weight * suffix * mask[row].sum() / mask.sum()
    total.backward()
    gradients = {key: parameter.grad for key, parameter in model.named_parameters()}
    return {"total": total.item(), "clm": clm.item(), "kl": kl.item()}, gradients
