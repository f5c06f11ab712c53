"""Reading a Hugging Face model folder: config.json, safetensors, and what they say about the model.

Only safetensors are read, lazily and one tensor at a time; a pickle is never opened. What config.json leaves out is
filled in as the model's own configuration class in transformers would; what this project cannot represent is refused.
"""

import json
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from torch import Tensor

from megatron_rpsd.checkpoint.families import (
    EMBEDDING,
    TIED_OUTPUT,
    Family,
    MappedTensor,
    check_names,
    entries,
    family_of,
)
from megatron_rpsd.checkpoint.layouts import ModelDimensions, bitwise_equal
from megatron_rpsd.checkpoint.safetensors_file import StoredTensor, read_header, read_tensor

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

SUPPORTED_SCALINGS = ("linear", "llama3", "yarn")
# These compare positions with the length the model was trained at before scaling.
_NEEDS_ORIGINAL_LENGTH = ("llama3", "yarn")
_DEFAULT_ROTARY_BASE = 10000.0


class HFFolder:
    """A model folder in Hugging Face form.

    Attributes:
        path: the folder.
        config: the parsed config.json, as it is.
        family: the model's family.

    Raises:
        ValueError: no config.json or one that is not a JSON object, a model that does not convert, quantised weights,
            no safetensors, or an index that is malformed, names a missing file or leads out of the folder.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config = _read_json_object(self.path / "config.json")
        if self.config.get("quantization_config"):
            raise ValueError(
                f"{self.path / 'config.json'}: quantization_config is set; quantised weights do not convert, "
                "export the model in bfloat16 or float32 first"
            )
        self.family = family_of(self.config)
        self._open_files: dict[str, BinaryIO] = {}
        self._stored: dict[str, tuple[str, StoredTensor]] = self._read_headers()

    def names(self) -> list[str]:
        """The names of all tensors in the folder, sorted."""
        return sorted(self._stored)

    def stored(self, name: str) -> StoredTensor:
        """A tensor's dtype, shape and place in its file."""
        if name not in self._stored:
            raise ValueError(f"{self.path} holds no tensor {name}")
        return self._stored[name][1]

    def tensor(self, name: str) -> Tensor:
        """One tensor, on the CPU, in the dtype it is stored in and in memory of its own."""
        stored = self.stored(name)
        file_name = self._stored[name][0]
        if file_name not in self._open_files:
            self._open_files[file_name] = (self.path / file_name).open("rb", buffering=0)
        try:
            return read_tensor(self._open_files[file_name].fileno(), stored)
        except (OSError, ValueError) as error:
            raise ValueError(f"{self.path / file_name}: cannot read tensor {name}: {error}") from error

    def full_tensors(self) -> Iterator[tuple[MappedTensor, Tensor]]:
        """Every tensor of the Megatron model, in the table's order, one in memory at a time.

        Yields:
            (its line of the table, the full tensor with the stored dtype).

        Raises:
            ValueError: before the first tensor, when a tensor is missing or has no counterpart, or when a tied model
                carries an output weight other than its embedding; later, when a shape contradicts config.json.
        """
        dims = self.dimensions()
        self.check()
        for mapped in entries(dims):
            try:
                full = mapped.layout.to_megatron([self.tensor(name) for name in mapped.hf_names], dims)
            except ValueError as error:
                raise ValueError(f"{self.path}: {', '.join(mapped.hf_names)}: {error}") from error
            yield mapped, full

    def check(self) -> None:
        """Raise ValueError unless the folder's tensors are exactly the model's, by name and shape (no tensor is read,
        but for a tied model's second copy of its embedding)."""
        dims = self.dimensions()
        try:
            check_names(self.names(), dims)
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from error
        for mapped in entries(dims):
            for name, shape in zip(mapped.hf_names, mapped.hf_shapes, strict=True):
                if self.stored(name).shape != shape:
                    raise ValueError(
                        f"{self.path}: {name} has shape {list(self.stored(name).shape)}; by config.json it should be "
                        f"{list(shape)}"
                    )
        if dims.tied and TIED_OUTPUT in self._stored:
            if not bitwise_equal(self.tensor(TIED_OUTPUT), self.tensor(EMBEDDING)):
                raise ValueError(
                    f"{self.path}: tie_word_embeddings is true, yet {TIED_OUTPUT} differs from {EMBEDDING}; "
                    "set tie_word_embeddings to false in config.json if both are meant"
                )

    def dimensions(self) -> ModelDimensions:
        """The model's dimensions; see ``dimensions_of``."""
        try:
            return dimensions_of(self.config, self.family)
        except ValueError as refused:
            raise ValueError(f"{self.path}/{refused}") from refused

    def rope(self) -> tuple[float, dict | None, int]:
        """(rotary_base, scaling in Hugging Face's schema or None, max_position_embeddings); see ``rope_of``."""
        return rope_of(self.config)

    def check_tokenizer(self) -> bool:
        """Raise ValueError when tokenizer.json has more tokens than the model has rows; False without such a file."""
        path = self.path / "tokenizer.json"
        if not path.is_file():
            return False
        tokenizer = _read_json_object(path)
        vocabulary = (tokenizer.get("model") or {}).get("vocab") or {}
        identifiers = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
        added = (token["id"] for token in tokenizer.get("added_tokens") or [])
        tokens = 1 + max([*identifiers, *added], default=-1)
        size = self.dimensions().vocab_size
        if tokens > size:
            raise ValueError(
                f"{path} has {tokens} tokens, config.json a vocab_size of {size}: {tokens - size} tokens would have no "
                "embedding; use the model's own tokenizer"
            )
        return True

    def _read_headers(self) -> dict[str, tuple[str, StoredTensor]]:
        """File and place of every tensor."""
        # transformers looks for the single file first, so a stale index beside it is not what the model loads from.
        if (self.path / SINGLE_FILE).is_file():
            return {name: (SINGLE_FILE, stored) for name, stored in read_header(self.path / SINGLE_FILE).items()}
        weight_map = self._read_index()
        headers = {file_name: read_header(self.path / file_name) for file_name in sorted(set(weight_map.values()))}
        for name, file_name in weight_map.items():
            if name not in headers[file_name]:
                raise ValueError(f"{self.path / INDEX_FILE}: {file_name} does not hold {name}, as the index says")
        for file_name, header in headers.items():
            unknown = sorted(name for name in header if weight_map.get(name) != file_name)
            if unknown:
                raise ValueError(f"{self.path / file_name}: holds {unknown[0]}, where the index does not name it")
        return {name: (file_name, headers[file_name][name]) for name, file_name in weight_map.items()}

    def _read_index(self) -> dict[str, str]:
        """The index's weight_map, every file of it in the folder."""
        index_path = self.path / INDEX_FILE
        if not index_path.is_file():
            pickles = sorted(file.name for file in self.path.glob("*.bin"))
            has = f"only {pickles[0]}; pickles are never read, save the model as safetensors" if pickles else "neither"
            raise ValueError(f"{self.path}: needs {SINGLE_FILE} or {INDEX_FILE}, has {has}")
        weight_map = _read_json_object(index_path).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{index_path}: weight_map is missing or empty")
        for file_name in sorted({str(value) for value in weight_map.values()}):
            # By name, not by resolved path: a folder in the Hugging Face cache consists of links that lead out of it.
            parts = PurePosixPath(file_name)
            if parts.is_absolute() or ".." in parts.parts or "\\" in file_name or parts.suffix != ".safetensors":
                raise ValueError(f"{index_path}: {file_name!r} is not the name of a safetensors file inside the folder")
            if not (self.path / file_name).is_file():
                raise ValueError(f"{index_path}: names {file_name}, which is not in the folder; fetch it again")
        return weight_map


def dimensions_of(config: dict, family: Family) -> ModelDimensions:
    """The dimensions that a parsed config.json describes.

    Raises:
        ValueError: a needed key is absent or not a positive integer, the query heads do not divide by the key/value
            heads, or the model has a feature (bias, activation, attention window) outside the common decoder.
    """
    _refuse_features(config, family)
    heads = _positive(config, "num_attention_heads")
    groups = _positive(config, "num_key_value_heads", family.default_key_value_heads or heads, null=heads)
    if heads % groups:
        raise ValueError(
            f"config.json: num_attention_heads={heads} does not divide by num_key_value_heads={groups}: "
            f"{heads} % {groups} = {heads % groups}"
        )
    hidden = _positive(config, "hidden_size")
    per_head = hidden // heads
    head_dim = _positive(config, "head_dim", family.default_head_dim or per_head, null=per_head)
    return ModelDimensions(
        num_layers=_positive(config, "num_hidden_layers"),
        hidden_size=hidden,
        ffn_hidden_size=_positive(config, "intermediate_size"),
        num_attention_heads=heads,
        num_query_groups=groups,
        head_dim=head_dim,
        vocab_size=_positive(config, "vocab_size"),
        tied=bool(config.get("tie_word_embeddings", False)),
        qk_norm=family.qk_norm,
        qkv_bias=family.qkv_bias,
    )


def _refuse_features(config: dict, family: Family) -> None:
    for switch in family.refused_switches:
        if config.get(switch):
            raise ValueError(f"config.json: {switch}=true: such biases do not convert for {family.architecture}")
    if config.get("hidden_act", "silu") != "silu":
        raise ValueError(f"config.json: hidden_act={config['hidden_act']!r} does not convert; only 'silu' does")
    context = _positive(config, "max_position_embeddings")
    window = config.get("sliding_window", family.default_sliding_window)
    if family.model_type == "mistral" and window is not None and window < context:
        absent = "" if "sliding_window" in config else " (the default of an absent key)"
        raise ValueError(
            f"config.json: sliding_window={window}{absent} < max_position_embeddings={context}: attention windows "
            "do not convert; set sliding_window to null if the model attends to its whole context"
        )
    windowed = "sliding_attention" in (config.get("layer_types") or ["sliding_attention"])
    if config.get("use_sliding_window") and windowed:
        raise ValueError("config.json: use_sliding_window=true: attention windows do not convert")


def rope_of(config: dict) -> tuple[float, dict | None, int]:
    """What config.json says about rotary positions, in either schema.

    transformers 5 writes ``rope_parameters`` {rope_type, rope_theta, ...}; earlier releases wrote ``rope_theta`` beside
    ``rope_scaling`` {rope_type or type, ...}. Where both stand, ``rope_scaling`` is read, as transformers 5 does.

    Returns:
        rotary_base: theta, at 10,000 when absent.
        scaling: None, or {"rope_type": ..., "factor": ..., ...} without ``rope_theta``. What transformers would derive
            from ``max_position_embeddings`` is written out: the result has to survive a change of that length.
        max_position_embeddings: positions.

    Raises:
        ValueError: the schemas give different bases, only part of a head is rotated, or the scaling is not supported.
    """
    context = _positive(config, "max_position_embeddings")
    scaling = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    if any(isinstance(value, dict) for value in scaling.values()):
        raise ValueError("config.json: rope_parameters per layer type do not convert; only one set for all layers does")
    rotary_base = _rotary_base(config)
    scaling.pop("rope_theta", None)
    partial = scaling.pop("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise ValueError(f"config.json: partial_rotary_factor={partial}: only whole heads are rotated here (1.0)")
    legacy_type = scaling.pop("type", None)
    rope_type = scaling.pop("rope_type", legacy_type) or "default"
    if rope_type == "default":
        return rotary_base, None, context
    if rope_type not in SUPPORTED_SCALINGS:
        supported = ", ".join(("default", *SUPPORTED_SCALINGS))
        raise ValueError(f"config.json: rope_type={rope_type!r} is not supported; supported: {supported}")
    if rope_type in _NEEDS_ORIGINAL_LENGTH:
        original = config.get("original_max_position_embeddings") or scaling.get("original_max_position_embeddings")
        scaling["original_max_position_embeddings"] = original or context
    if scaling.get("factor") is None and rope_type == "yarn":
        scaling["factor"] = context / scaling["original_max_position_embeddings"]
    if scaling.get("factor") is None:
        raise ValueError(f"config.json: rope_type={rope_type!r} needs a factor")
    return rotary_base, {"rope_type": rope_type, **scaling}, context


def _rotary_base(config: dict) -> float:
    """Theta from the three places it can stand in, which have to agree."""
    places = {
        "rope_theta": config.get("rope_theta"),
        "rope_scaling.rope_theta": (config.get("rope_scaling") or {}).get("rope_theta"),
        "rope_parameters.rope_theta": (config.get("rope_parameters") or {}).get("rope_theta"),
    }
    given = {place: float(base) for place, base in places.items() if base is not None}
    if len(set(given.values())) > 1:
        listed = ", ".join(f"{place}={base:g}" for place, base in given.items())
        raise ValueError(f"config.json gives different RoPE bases: {listed}")
    if config.get("rope_scaling") and list(given) == ["rope_parameters.rope_theta"]:
        (base,) = given.values()
        raise ValueError(
            f"config.json: beside rope_scaling, transformers ignores rope_parameters.rope_theta={base:g} and takes "
            f"{_DEFAULT_ROTARY_BASE:g}; write rope_theta at the top level"
        )
    return next(iter(given.values()), _DEFAULT_ROTARY_BASE)


def _read_json_object(path: Path) -> dict:
    if not path.is_file():
        raise ValueError(f"{path} does not exist: not a Hugging Face model folder")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, holds a {type(value).__name__}")
    return value


def _positive(config: dict, key: str, absent: int | None = None, null: int | None = None) -> int:
    """A positive integer of config.json; ``absent`` and ``null`` say what those cases mean (None: an error)."""
    value = config[key] if key in config else absent
    if value is None and key in config:
        value = null
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"config.json: {key}={config.get(key, '(absent)')} must be a positive integer")
    return value
