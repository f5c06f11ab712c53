"""Models that a plan knows by name, as their config.json describes them, and any other by its folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_rpsd.checkpoint.families import family_of
from megatron_rpsd.checkpoint.hf_folder import _read_json_object, dimensions_of, rope_of
from megatron_rpsd.checkpoint.layouts import ModelDimensions
from megatron_rpsd.planning import ModelShape


def _config(model_type: str, architecture: str, sizes: tuple[int, ...], vocab: int, theta: float, **more) -> dict:
    layers, hidden, ffn, heads, groups, head_dim = sizes
    return {
        "model_type": model_type, "architectures": [architecture], "num_hidden_layers": layers, "hidden_size": hidden,
        "intermediate_size": ffn, "num_attention_heads": heads, "num_key_value_heads": groups, "head_dim": head_dim,
        "vocab_size": vocab, "rope_theta": theta, **more,
    }  # fmt: skip


# Facts of the config.json that each model is published with.
KNOWN_MODELS = {
    "llama3-8b": _config(
        "llama", "LlamaForCausalLM", (32, 4096, 14336, 32, 8, 128), 128256, 500000.0,
        max_position_embeddings=8192, rms_norm_eps=1e-5, tie_word_embeddings=False,
    ),
    "qwen3-4b": _config(
        "qwen3", "Qwen3ForCausalLM", (36, 2560, 9728, 32, 8, 128), 151936, 1000000.0,
        max_position_embeddings=40960, rms_norm_eps=1e-6, tie_word_embeddings=True,
    ),
    "qwen2.5-7b": _config(
        "qwen2", "Qwen2ForCausalLM", (28, 3584, 18944, 28, 4, 128), 152064, 1000000.0,
        max_position_embeddings=32768, rms_norm_eps=1e-6, tie_word_embeddings=False,
    ),
    "smollm2-135m": _config(
        "llama", "LlamaForCausalLM", (30, 576, 1536, 9, 3, 64), 49152, 100000.0,
        max_position_embeddings=8192, rms_norm_eps=1e-5, tie_word_embeddings=True,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class PlannedModel:
    """A model before any weight of it is read."""

    name: str
    dims: ModelDimensions
    config: dict

    def dimensions(self) -> ModelDimensions:
        """As `HFFolder` gives them, so that `megatron_arguments` takes either."""
        return self.dims

    def rope(self) -> tuple[float, dict | None, int]:
        """Base, scaling and trained length; see `hf_folder.rope_of`."""
        return rope_of(self.config)

    @property
    def shape(self) -> ModelShape:
        """What operations are counted with."""
        dims = self.dims
        return ModelShape(
            dims.num_layers, dims.hidden_size, dims.ffn_hidden_size, dims.num_attention_heads, dims.num_query_groups,
            dims.head_dim, dims.vocab_size,
        )  # fmt: skip


def planned_model(model: str) -> PlannedModel:
    """A known name, or a Hugging Face folder (its config.json is enough), or the path of a config.json.

    Raises:
        ValueError: neither, or a model that does not convert.
    """
    if model in KNOWN_MODELS:
        return of_config(model, KNOWN_MODELS[model])
    path = Path(model)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        names = ", ".join(sorted(KNOWN_MODELS))
        raise ValueError(f"--model {model}: neither a known name ({names}) nor a folder with a config.json")
    return of_config(path.parent.resolve().name, _read_json_object(path))


def of_config(name: str, config: dict) -> PlannedModel:
    """The model of a parsed config.json; ValueError as `checkpoint.hf_folder` refuses it."""
    dims = dimensions_of(config, family_of(config))
    rope_of(config)
    return PlannedModel(name, dims, config)
