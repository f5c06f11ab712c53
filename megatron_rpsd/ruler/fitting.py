"""The largest size that fits a length, and samples of it, drawn in RULER's order."""

from __future__ import annotations

from collections.abc import Iterator

from tokenizers import Encoding

from megatron_rpsd.ruler.counting import TokenCounter
from megatron_rpsd.ruler.frequencies import FrequentWords
from megatron_rpsd.ruler.prompts import Family, Prompt


def fits(family: Family, tokens: int) -> bool:
    return tokens + family.task.generated_tokens <= family.length


def search_size(family: Family, counter: TokenCounter) -> int:
    """The search's result. It draws, so every later sample depends on the tokenizer and the length.

    The families but FWE are searched by halving; where no size fits, RULER goes on with the smallest.
    """
    sample = family.begin(0)

    def tokens(size: int) -> int:
        prompt = family.probe(size, sample)
        if prompt is None:
            raise ValueError(f"--seed {family.draws.seed}: {family.task.name} draws what RULER fails on")
        return counter.count(prompt.text) + family.extra_tokens

    if isinstance(family, FrequentWords):
        size = family.room // 6
        while tokens(size) < family.room:
            size += family.step
        return size - family.step
    first = family.first_estimate()
    # The estimate leaves out what a sample has beyond a probe.
    per = (tokens(first) - family.extra_tokens) / first
    low, high, best = family.step, max(family.highest(per), 2 * family.step), family.step
    while low <= high:
        middle = (low + high) // 2
        if fits(family, tokens(middle)):
            best, low = middle, middle + 1
        else:
            high = middle - 1
    family.check_size(best)
    return best


def _shrink(family: Family, counter: TokenCounter, size: int, sample: object, tokens: int | None) -> tuple:
    """Builds a sample again, a step smaller at a time, until it fits."""
    while True:
        if size <= family.step:
            needed = "cannot be built" if tokens is None else f"has {tokens} tokens"
            raise ValueError(
                f"{family.refusal}: its smallest prompt, {size} {family.unit}, {needed}, and "
                f"{family.task.generated_tokens} are kept for the answer"
            )
        size -= family.step
        prompt = family.build(size, sample)
        tokens = None
        if prompt is not None:
            encoding = counter.encode([prompt.text])[0]
            tokens = len(encoding)
            if fits(family, tokens):
                return prompt, encoding


def fitting_samples(
    family: Family, counter: TokenCounter, size: int, number: int, batch: int = 16
) -> Iterator[tuple[Prompt, Encoding]]:
    """`number` prompts that fit, each with its tokens.

    `batch` prompts are drawn as if all fitted and tokenized at once, on all cores. Where one does not fit, the random
    state goes back to just behind its draws, and what was drawn after it is thrown away: any batch gives what 1 gives.
    """
    done = 0
    while done < number:
        tried = []
        for index in range(done, min(done + batch, number)):
            sample = family.begin(index)
            tried.append((sample, family.build(size, sample), family.draws.state()))
        encodings = counter.encode([prompt.text if prompt else "" for _, prompt, _ in tried])
        for (sample, prompt, state), encoding in zip(tried, encodings, strict=True):
            done += 1
            if prompt is not None and fits(family, len(encoding)):
                yield prompt, encoding
                continue
            family.draws.restore(state)
            yield _shrink(family, counter, size, sample, len(encoding) if prompt else None)
            break
