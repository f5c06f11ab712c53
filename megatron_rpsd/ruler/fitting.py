"""The largest size that fits a length, and samples of it, drawn in RULER's order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from megatron_rpsd.ruler.counting import TokenCounter, Tokens
from megatron_rpsd.ruler.frequencies import FrequentWords
from megatron_rpsd.ruler.prompts import Family, Layout, Prompt

# How often a prompt's count by pieces is compared with the tokenizer's own.
CHECKED_EVERY = 50
# A prompt that does not fit is drawn again at most so often where the size stays the same.
MOST_REDRAWS = 100


@dataclass(frozen=True)
class Sample:
    prompt: Prompt
    tokens: Tokens
    """Those of `prompt`."""
    fitted: int
    """The number that was held against the budget; edition 2024-12 counts VT before its last change."""
    labels: dict = field(default_factory=dict)
    """item and depth in a position grid; beyond_ruler where RULER's own generator would not have ended."""


def probe_counter(family: Family, counter: TokenCounter, tail: Callable[[Prompt], str]) -> Callable[[int], int]:
    """A function from a size to the tokens of a probe of it and of the text `tail` behind it; it draws."""
    sample = family.start(0)

    def tokens(size: int) -> int:
        prompt = family.probe(size, sample)
        if prompt is None:
            raise ValueError(f"--seed {family.draws.seed}: {family.task.name} draws what RULER fails on")
        text = family.wrap(prompt).text + tail(prompt)
        counter.settle(text)
        return counter.count(text) + family.extra_tokens

    return tokens


def search_size(family: Family, counter: TokenCounter) -> int:
    """The search's result. It draws, so every later sample depends on the tokenizer and the length.

    The families but FWE are searched by halving; where no size fits, RULER goes on with the smallest.
    """
    tokens = probe_counter(family, counter, lambda prompt: "")
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
        if family.fits(tokens(middle)):
            best, low = middle, middle + 1
        else:
            high = middle - 1
    family.check_size(best)
    return best


def refuse(family: Family, size: int, tokens: int | None) -> ValueError:
    needed = "cannot be built" if tokens is None else f"has {tokens} tokens"
    return ValueError(
        f"{family.refusal}: its smallest prompt, {size} {family.unit}, {needed}, and {family.reserved} are kept for "
        "the answer"
    )


def _measure(family: Family, counter: TokenCounter, prompts: Sequence[Prompt | None]) -> list[Tokens | None]:
    found = iter(counter.measure([family.wrap(prompt).text for prompt in prompts if prompt]))
    return [next(found) if prompt else None for prompt in prompts]


def _sample(family: Family, counter: TokenCounter, prompt: Prompt, tokens: Tokens, finished: Prompt) -> Sample:
    fitted, wrapped = len(tokens) + family.sample_extra_tokens, family.wrap(finished)
    if finished is not prompt:
        (tokens,) = counter.measure([wrapped.text])
    return Sample(wrapped, tokens, fitted)


def _fits(family: Family, tokens: Tokens | None) -> bool:
    return tokens is not None and family.fits(len(tokens) + family.sample_extra_tokens)


def _shrink(family: Family, counter: TokenCounter, size: int, sample: object, tokens: Tokens | None) -> Sample:
    """Builds a sample again, a step smaller at a time, until it fits."""
    redraws, family.beyond_ruler = 0, False
    while not _fits(family, tokens):
        after = family.smaller(size)
        redraws = redraws + 1 if after == size else 0
        if after is None or redraws > MOST_REDRAWS:
            raise refuse(family, size, tokens and len(tokens) + family.sample_extra_tokens)
        size = after
        prompt = family.build(size, sample)
        (tokens,) = _measure(family, counter, [prompt])
    labels = {"beyond_ruler": True} if family.beyond_ruler else {}
    return replace(_sample(family, counter, prompt, tokens, family.finish(prompt)), labels=labels)


def fitting_samples(
    family: Family, counter: TokenCounter, size: int, number: int, batch: int | None = None
) -> Iterator[Sample]:
    """`number` samples that fit.

    Where the tokenizer has to read whole texts, `batch` prompts (16) are drawn as if all fitted and tokenized at once.
    Where one does not fit, the random state goes back to just behind its draws, and what was drawn after it is thrown
    away: any batch gives what 1 gives. Where pieces are counted, nothing is gained by that, and `batch` is 1.
    """
    batch = batch or (1 if counter.pieces else 16)
    done = 0
    while done < number:
        tried = []
        for index in range(done, min(done + batch, number)):
            sample = family.start(index)
            prompt, state = family.build(size, sample), family.draws.state()
            tried.append((sample, prompt, state, prompt and family.finish(prompt)))
        measured = _measure(family, counter, [prompt for _, prompt, _, _ in tried])
        for (sample, prompt, state, finished), tokens in zip(tried, measured, strict=True):
            refused = not _fits(family, tokens)
            if refused:
                family.draws.restore(state)
                found = _shrink(family, counter, size, sample, tokens)
            else:
                found = _sample(family, counter, prompt, tokens, finished)
            assert done % CHECKED_EVERY or counter.agree(found.prompt.text), "counting by pieces went wrong"
            done += 1
            yield found
            if refused:
                break


def grid_samples(
    family: Family, counter: TokenCounter, size: int, items: int, depths: Sequence[float]
) -> Iterator[Sample]:
    """`items` items at every depth each, a depth after another.

    An item that does not fit at one of the depths is drawn again, a step smaller, at all of them: its needles and
    what it asks for stay, as they are drawn first.
    """
    for item in range(items):
        smaller = size
        while True:
            family.start(item)
            layout: Layout = family.layout(smaller)
            prompts = [layout.at(depth) for depth in depths]
            tokens = _measure(family, counter, prompts)
            if all(_fits(family, one) for one in tokens):
                break
            if (after := family.smaller(smaller)) is None:
                raise refuse(family, smaller, max(map(len, tokens)))
            smaller = after
        assert item % CHECKED_EVERY or counter.agree(family.wrap(prompts[0]).text), "counting by pieces went wrong"
        for depth, prompt, one in zip(depths, prompts, tokens, strict=True):
            yield Sample(family.wrap(prompt), one, len(one), {"item": item, "depth": depth})
