"""Tiny random Hugging Face models, saved by transformers itself."""

import json

import pytest
import torch
import transformers

SIZES = dict(
    vocab_size=97,  # prime, so that every split has to pad
    hidden_size=24,
    intermediate_size=36,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=3,
    max_position_embeddings=64,
)
MODELS = {
    "llama": ("Llama", dict(rope_parameters={"rope_type": "default", "rope_theta": 500000.0})),
    "llama-tied": ("Llama", dict(tie_word_embeddings=True, num_key_value_heads=6)),
    "llama-wide-heads": ("Llama", dict(head_dim=6, num_key_value_heads=2)),
    "qwen2": ("Qwen2", dict(num_key_value_heads=2, tie_word_embeddings=True)),
    "qwen3": ("Qwen3", dict(head_dim=8)),
    "mistral": ("Mistral", dict(num_key_value_heads=1, sliding_window=None)),
}


def _randomise(model: torch.nn.Module) -> None:
    """Norms start at one and biases at zero, where exchanged tensors would go unseen."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


@pytest.fixture
def save_model(tmp_path):
    """save_model(kind, **save_pretrained options) -> (folder, model)."""

    def save(kind: str, dtype: torch.dtype = torch.float32, **options):
        name, overrides = MODELS[kind]
        config = getattr(transformers, f"{name}Config")(**{**SIZES, **overrides})
        model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
        _randomise(model)
        model = model.to(dtype)
        folder = tmp_path / f"hf-{kind}"
        model.save_pretrained(folder, **options)
        return folder, model

    return save


@pytest.fixture
def edit_config():
    """edit_config(folder, key=value, ...) rewrites config.json; the value ``...`` removes the key."""

    def edit(folder, **changes):
        path = folder / "config.json"
        config = json.loads(path.read_text())
        for key, value in changes.items():
            if value is ...:
                config.pop(key, None)
            else:
                config[key] = value
        path.write_text(json.dumps(config))
        return config

    return edit
