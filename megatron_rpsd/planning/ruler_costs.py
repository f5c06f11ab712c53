"""Measured time of making RULER's prompts beside the procedure as RULER's own generator runs it, in one process.

The plain procedure, written anew from the protocol for NIAH among needles: the list of all word pairs is built, and
every probe of the search and every prompt is tokenized whole by transformers' `tokenize`, one after another, as is the
text before every answer. Both write the same bytes, which is checked. Imports count for neither, a tokenizer's loading
counts for both; ours writes the evidence and the manifest, too.
"""

from __future__ import annotations

import json
import os
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from megatron_rpsd.ruler.generate import Recipe, write_prompts
from megatron_rpsd.ruler.tasks import NEEDLE, NIAH_PREFIX, NIAH_TEMPLATE, find_task
from megatron_rpsd.ruler.words import word_lists, word_pairs

TASK, GENERATED = "niah_multikey_2", 128


class _Plain:
    """One stream of draws, one prompt at a time."""

    def __init__(self, tokenizer: Path, length: int, seed: int = 42) -> None:
        from transformers import AutoTokenizer

        self.length, self.random = length, random.Random(seed)
        self.tokenizer = AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
        words = word_lists()
        self.pool = sorted({f"{adjective}-{noun}" for adjective in words["adjective"] for noun in words["noun"]})

    def count(self, text: str) -> int:
        return len(self.tokenizer.tokenize(text))

    def _needle(self) -> tuple[str, str, str]:
        key, value = self.random.choice(self.pool), str(self.random.randint(1000000, 9999999))
        return key, value, NEEDLE.format(values="numbers", key=key, value=value)

    def prompt(self, size: int) -> tuple[str, str, str]:
        """The text, the answer's prefix and the answer."""
        key, value, needle = self._needle()
        lines = [self._needle()[2] for _ in range(size)]
        lines.insert(self.random.sample(range(size), 1)[0], needle)
        self.random.sample(range(1), 1)
        text, prefix = (
            part.replace("Some", "A").replace("are all", "is").replace("are", "is").replace("{values}", "number")
            for part in (NIAH_TEMPLATE, NIAH_PREFIX)
        )
        text = text.replace("{query}", key).replace("{context}", "\n".join(lines))
        return text, prefix.replace("{query}", key), value

    def fits(self, size: int) -> tuple[int, tuple[str, str, str]]:
        made = self.prompt(size)
        return self.count(made[0] + made[1]) + GENERATED, made

    def write(self, samples: int, output: Path) -> None:
        step = 5 if self.length < 4096 else 25
        low, best = step, step
        high = max(int(self.length / ((self.fits(step)[0] - GENERATED) / step) * 3), 2 * step)
        while low <= high:
            middle = (low + high) // 2
            if self.fits(middle)[0] <= self.length:
                best, low = middle, middle + 1
            else:
                high = middle - 1
        with output.open("w") as file:
            for _ in range(samples):
                size = best
                while (found := self.fits(size))[0] > self.length:
                    size -= step
                total, (text, prefix, value) = found
                at = text.find(value)
                fields = {"index": at, "input": text, "outputs": [value], "length": total, "length_w_model_temp": total}
                fields |= {"answer_prefix": prefix, "token_position_answer": self.count(text[:at])}
                file.write(json.dumps(fields) + "\n")


def measure_prompts(
    tokenizer: Path, length: int, samples: int, progress: Callable[[str], None] = lambda line: None
) -> dict:
    """Seconds, by the clock and of the processor, of `samples` prompts of niah_multikey_2 both ways, and their ratios.

    Args:
        tokenizer: folder of a Hugging Face tokenizer.
        length: tokens of a sample, those of the answer included.

    Returns:
        seconds and cpu_seconds by way (ours, plain), ratio and cpu_ratio (ours over plain), and what was measured.
    """
    import transformers  # noqa: F401  (its import counts for neither)

    recipe = Recipe(find_task(TASK), length, samples)
    seconds, cpu_seconds = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        paths = {way: Path(folder) / f"{way}.jsonl" for way in ("ours", "plain")}
        runs = {
            "ours": lambda: write_prompts(recipe, tokenizer, None, paths["ours"]),
            "plain": lambda: _Plain(tokenizer, length).write(samples, paths["plain"]),
        }
        for way, run in runs.items():
            word_lists.cache_clear()
            word_pairs.cache_clear()
            clock, processor = time.perf_counter(), time.process_time()
            run()
            seconds[way], cpu_seconds[way] = time.perf_counter() - clock, time.process_time() - processor
            progress(f"{way}: {seconds[way]:.2f} s, {cpu_seconds[way]:.2f} s of the processor")
        assert paths["ours"].read_bytes() == paths["plain"].read_bytes(), "the two procedures gave different prompts"
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "ratio": seconds["ours"] / seconds["plain"],
        "cpu_ratio": cpu_seconds["ours"] / cpu_seconds["plain"],
        "task": TASK,
        "length": length,
        "samples": samples,
        "device": f"cpu, {os.cpu_count()} cores",
    }
