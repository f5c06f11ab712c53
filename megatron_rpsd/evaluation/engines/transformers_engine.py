"""Answers by transformers' own model code, on a CPU or one GPU: greedy, with a KV cache and a prompt read in chunks.

Logits are computed where they are read: at a prompt's last position, at each generated token, at the gold answer's
tokens. A chunk of c tokens after p others takes activations of c tokens and a mask of c x (p + c), so that memory grows
with the length by the cache alone.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.utils.logging import disable_progress_bar

from megatron_rpsd.evaluation.engines.base import Completion, Engine, Forced
from megatron_rpsd.evaluation.engines.model_facts import LENGTH_DEPENDENT, ModelFacts, yarn_parameters
from megatron_rpsd.evaluation.engines.prompt_tokens import PromptTokens, forced_score
from megatron_rpsd.evaluation.samples import Sample

DEFAULT_CHUNK = 2048


def choose_dtype(dtype: str, device: str) -> str:
    """`auto` is float32 on a CPU, bfloat16 on a GPU."""
    if dtype != "auto":
        return dtype
    return "float32" if device == "cpu" else "bfloat16"


def _refusing_memory(method: Callable) -> Callable:
    """The method, with a full GPU as one line."""

    @functools.wraps(method)
    def wrapped(*args, **kwargs):
        try:
            return method(*args, **kwargs)
        except torch.OutOfMemoryError:
            raise ValueError(
                "the GPU's memory is full: use a smaller --prefill-chunk or --batch-size, --dtype bfloat16, "
                "--attention flash_attention_2, or shorter --lengths; answers so far are kept"
            ) from None

    return wrapped


class TransformersEngine(Engine):
    """A Hugging Face folder. RULER's generation: greedy, no penalties, no stop words, ended by EOS or the task's limit.

    Args:
        facts: the folder.
        tokens: its tokenizer.
        factor: YaRN's, None for the model as it is.
        device: torch's name of it.
        dtype: float32, bfloat16, float16, or auto.
        prefill_chunk: tokens of a prompt that are read at a time; 0 reads it whole, None means 2,048, or whole where
            the model's RoPE looks at the length of each forward.
        batch_size: prompts at once, padded on the left. With 1, the default, there is no padding anywhere.
        attention: transformers' `attn_implementation`.
    """

    name = "transformers"
    fixed_batches = True

    def __init__(
        self,
        facts: ModelFacts,
        tokens: PromptTokens,
        factor: float | None = None,
        device: str = "cpu",
        dtype: str = "auto",
        prefill_chunk: int | None = None,
        batch_size: int = 1,
        attention: str = "sdpa",
    ) -> None:
        if batch_size < 1 or (prefill_chunk or 0) < 0:
            raise ValueError(f"--batch-size {batch_size} and --prefill-chunk {prefill_chunk} cannot be that small")
        if facts.rope_type in LENGTH_DEPENDENT:
            if prefill_chunk:
                raise ValueError(
                    f"--prefill-chunk {prefill_chunk}: the model's RoPE is of type {facts.rope_type}, whose "
                    "frequencies depend on the length of each forward; use --prefill-chunk 0"
                )
            prefill_chunk = 0
        self.facts, self.tokens, self.factor = facts, tokens, factor
        self.device, self.dtype = device, choose_dtype(dtype, device)
        self.prefill_chunk = DEFAULT_CHUNK if prefill_chunk is None else prefill_chunk
        self.batch_size, self.attention = batch_size, attention
        self.warm_up_tokens = 512 if device == "cpu" else 8192
        self.model = None
        self._prompt: tuple[list[int], DynamicCache] | None = None  # the last prompt read, for its gold answer

    def describe(self) -> dict:
        return {
            "name": self.name,
            "device": self.device if self.device == "cpu" else torch.cuda.get_device_name(self.device),
            "dtype": self.dtype,
            "attention": self.attention,
            "prefill_chunk": self.prefill_chunk,
            "batch_size": self.batch_size,
        }

    def load(self) -> None:
        """Bring the weights; ValueError where the model cannot give logits of chosen positions alone."""
        if not sys.stderr.isatty():
            disable_progress_bar()  # of loading weights, which fills a log
        config = self.facts.config
        if self.factor is not None:
            config.rope_parameters = yarn_parameters(self.facts, self.factor)
            config.max_position_embeddings = int(config.max_position_embeddings * self.factor)
        self.model = AutoModelForCausalLM.from_pretrained(
            str(self.facts.folder), config=config, dtype=getattr(torch, self.dtype), attn_implementation=self.attention
        )
        if "logits_to_keep" not in inspect.signature(self.model.forward).parameters:
            raise ValueError(
                f"--hf {self.facts.folder}: transformers' {type(self.model).__name__} has no logits_to_keep, and would "
                "make logits of whole prompts"
            )
        self.model.to(self.device).eval()
        eos = self.model.generation_config.eos_token_id
        given = [eos] if isinstance(eos, int) else list(eos or ())
        self.eos_ids = frozenset(given) or self.tokens.eos_ids

    def close(self) -> None:
        self.model = self._prompt = None

    def complete(self, samples: Sequence[Sample]) -> Iterator[tuple[Sample, Completion]]:
        for start in range(0, len(samples), self.batch_size):
            batch = samples[start : start + self.batch_size]
            limits = [sample.generated_tokens for sample in batch]
            answers = self.generate([self.tokens.prompt_ids(sample) for sample in batch], limits)
            for sample, (ids, stopped) in zip(batch, answers, strict=True):
                yield sample, Completion(self.tokens.text(ids), len(ids), "stop" if stopped else "length")

    @_refusing_memory
    @torch.inference_mode()
    def generate(self, prompts: Sequence[list[int]], limits: Sequence[int]) -> list[tuple[list[int], bool]]:
        """Greedy answers, without EOS, and whether EOS ended each.

        Args:
            prompts: token ids, at least one each.
            limits: the most tokens of each answer, at least 1.
        """
        self._prompt = None
        cache, longest = DynamicCache(config=self.model.config), max(map(len, prompts))
        ids = torch.zeros(len(prompts), longest, dtype=torch.int64)  # [b, s], padded on the left
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        padded = None if bool(mask.all()) else mask.to(self.device)
        token = self._read(ids, cache, padded).argmax(-1)  # [b, 1]
        answers: list[tuple[list[int], bool]] = [([], False) for _ in prompts]
        while True:
            for row, value in enumerate(token[:, 0].tolist()):
                written, stopped = answers[row]
                if not stopped and len(written) < limits[row]:
                    answers[row] = (written, True) if value in self.eos_ids else ([*written, value], False)
            if all(stopped or len(out) == limit for (out, stopped), limit in zip(answers, limits, strict=True)):
                break
            if padded is not None:
                padded = torch.cat([padded, padded.new_ones(len(prompts), 1)], dim=1)
            token = self._forward(token, cache, padded).argmax(-1)
        if len(prompts) == 1:
            self._prompt = (prompts[0], cache)
        return answers

    def _read(self, ids: Tensor, cache: DynamicCache, mask: Tensor | None = None, wanted: int = 1) -> Tensor:
        """Append ids [b, s] to the cache in chunks; fp32 logits [b, wanted, v] of the last positions."""
        length = ids.shape[1]
        chunk = self.prefill_chunk or length
        # The wanted positions are one chunk of their own kind, at the end, never cut.
        for start in range(0, length - wanted, chunk):
            self._forward(ids[:, start : min(start + chunk, length - wanted)], cache, mask, 1)
        return self._forward(ids[:, length - wanted :], cache, mask, wanted)

    def _forward(self, ids: Tensor, cache: DynamicCache, mask: Tensor | None, wanted: int = 1) -> Tensor:
        past = cache.get_seq_length()
        ids = ids.to(self.device)
        more = {}
        if mask is not None:
            mask = mask[:, : past + ids.shape[1]]
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            more = {"attention_mask": mask, "position_ids": positions[:, past:]}
        logits = self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=wanted, **more).logits
        if logits.isnan().any():
            raise ValueError(
                f"--hf {self.facts.folder}: the logits are NaN in {self.dtype}, and every answer would be rubbish; try "
                "--dtype bfloat16 or float32"
            )
        return logits.float()

    def force(self, samples: Sequence[Sample]) -> Iterator[tuple[Sample, Forced]]:
        for sample in samples:
            ids, start, references = self.tokens.answer_ids(sample)
            nlls, greedy = self.answer_scores(list(ids), start)
            yield sample, forced_score(nlls, greedy, start, references)

    @_refusing_memory
    @torch.inference_mode()
    def answer_scores(self, ids: list[int], start: int) -> tuple[list[float], list[bool]]:
        """Nats of each token ids[start:], and whether it is the first choice, given all before it.

        Where ids[:start] is the prompt just answered, its cache is used again.
        """
        cache, known = self._cache_of(ids[:start])
        rows = torch.tensor([ids[known:-1]])
        logits = self._read(rows, cache, wanted=len(ids) - start)[0]  # [answer, v]
        gold = torch.tensor(ids[start:], device=logits.device)
        nlls = torch.nn.functional.cross_entropy(logits, gold, reduction="none")
        self._prompt = None
        return nlls.tolist(), (logits.argmax(-1) == gold).tolist()

    def _cache_of(self, prompt: list[int]) -> tuple[DynamicCache, int]:
        """A cache that holds this prompt but its last token, and how many that are; else an empty one and 0."""
        if self._prompt is not None and self._prompt[0] == prompt:
            cache = self._prompt[1]
            if all(type(layer) is DynamicLayer for layer in cache.layers):
                cache.crop(len(prompt) - 1 - cache.get_seq_length())
                return cache, len(prompt) - 1
        self._prompt = None
        return DynamicCache(config=self.model.config), 0
