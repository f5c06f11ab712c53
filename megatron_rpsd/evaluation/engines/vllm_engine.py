"""Answers by vLLM's offline interface. Written against its documented calls and tested on a stand-in for the package:
the machines that this library is tested on have no vLLM.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.util import find_spec

from megatron_rpsd.evaluation.engines.base import Completion, Engine, Forced
from megatron_rpsd.evaluation.engines.model_facts import ModelFacts, yarn_parameters
from megatron_rpsd.evaluation.engines.prompt_tokens import PromptTokens, forced_score
from megatron_rpsd.evaluation.samples import Sample


class VllmEngine(Engine):
    """A Hugging Face folder served by vLLM in this process, prompts given as token ids.

    vLLM refuses prompt + answer beyond `max_model_len`, which is the longest length wanted; with a BOS before a prompt
    that fills its budget the answer may therefore have one token less than the task allows.

    Args:
        facts: the folder.
        tokens: its tokenizer.
        factor: YaRN's, None for the model as it is; goes to vLLM as `hf_overrides`.
        longest: the longest length wanted, in tokens.
        dtype: vLLM's; `auto` is the folder's own.
        batch_size: prompts handed over at a time. vLLM orders its work itself; what was handed over last is lost when
            a run is killed.
        options: further arguments of `vllm.LLM`, such as {"tensor_parallel_size": 8}.
    """

    name = "vllm"
    warm_up_tokens = 8192

    def __init__(
        self,
        facts: ModelFacts,
        tokens: PromptTokens,
        factor: float | None,
        longest: int,
        dtype: str = "auto",
        batch_size: int = 64,
        options: dict | None = None,
    ) -> None:
        if find_spec("vllm") is None:
            raise ValueError("--backend vllm needs vLLM: pip install megatron_rpsd[vllm]")
        self.facts, self.tokens, self.factor, self.longest = facts, tokens, factor, longest
        self.dtype, self.batch_size, self.options = dtype, batch_size, dict(options or {})
        self.llm = None

    def arguments(self) -> dict:
        """What `vllm.LLM` is called with."""
        given = {
            "model": str(self.facts.folder),
            "tokenizer": str(self.tokens.folder),
            "dtype": self.dtype,
            "max_model_len": self.longest,
            "seed": 0,
        }
        if self.factor is not None:
            given["hf_overrides"] = {"rope_parameters": yarn_parameters(self.facts, self.factor)}
        return given | self.options

    def describe(self) -> dict:
        arguments = {key: value for key, value in self.arguments().items() if key not in ("model", "tokenizer")}
        return {"name": self.name, "batch_size": self.batch_size, "arguments": arguments}

    def load(self) -> None:
        import vllm

        self.llm = vllm.LLM(**self.arguments())

    def close(self) -> None:
        self.llm = None

    def _sampling(self, tokens: int, **more):
        import vllm

        return vllm.SamplingParams(temperature=0.0, top_p=1.0, max_tokens=tokens, skip_special_tokens=True, **more)

    def _generate(self, prompts: list[list[int]], parameters: list) -> list:
        return self.llm.generate([{"prompt_token_ids": ids} for ids in prompts], parameters, use_tqdm=False)

    def complete(self, samples: Sequence[Sample]) -> Iterator[tuple[Sample, Completion]]:
        for start in range(0, len(samples), self.batch_size):
            batch = samples[start : start + self.batch_size]
            prompts = [self.tokens.prompt_ids(sample) for sample in batch]
            parameters = [
                self._sampling(min(sample.generated_tokens, self.longest - len(ids)))
                for sample, ids in zip(batch, prompts, strict=True)
            ]
            answers = self._generate(prompts, parameters)
            for sample, ids, answer in zip(batch, prompts, answers, strict=True):
                if len(answer.prompt_token_ids) != len(ids):
                    raise ValueError(
                        f"{sample.id}: vLLM read {len(answer.prompt_token_ids)} tokens of a prompt of {len(ids)}"
                    )
                (written,) = answer.outputs
                stopped = written.finish_reason == "stop"
                # vLLM counts the EOS that ended an answer among its tokens.
                yield (
                    sample,
                    Completion(written.text, len(written.token_ids) - stopped, "stop" if stopped else "length"),
                )

    def force(self, samples: Sequence[Sample]) -> Iterator[tuple[Sample, Forced]]:
        for start in range(0, len(samples), self.batch_size):
            batch = samples[start : start + self.batch_size]
            wanted = [self.tokens.answer_ids(sample) for sample in batch]
            # vLLM generates at least one token; it is of no use here.
            once = [self._sampling(1, prompt_logprobs=1)] * len(batch)
            answers = self._generate([list(ids) for ids, _, _ in wanted], once)
            for sample, (ids, first, references), answer in zip(batch, wanted, answers, strict=True):
                gold = [answer.prompt_logprobs[place][ids[place]] for place in range(first, len(ids))]
                nlls, greedy = [-entry.logprob for entry in gold], [entry.rank == 1 for entry in gold]
                yield sample, forced_score(nlls, greedy, first, references)
