"""The 13 tasks of RULER (arXiv 2404.06654): what each draws, and the protocol's exact words; and variants of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

DIALECT = "RULER"
# RULER's repository since July 2025, and the package nvidia-long-context-eval 26.3. They give different prompts.
EDITION, EARLY_EDITION = "2025-07", "2024-12"
EDITIONS = (EDITION, EARLY_EDITION)
# Behind a task's name: its texts are this library's own; its slots are drawn anew for every sample; its evidence stands
# at given depths. No such task is RULER's, and none of their scores is averaged with RULER's.
SYNTHETIC, SHUFFLE, GRID = "@synthetic", "@shuffle", "@grid"

NIAH_TEMPLATE = (
    "Some special magic {values} are hidden within the following text. Make sure to memorize it. I will quiz you about "
    "the {values} afterwards.\n{context}\nWhat are all the special magic {values} for {query} mentioned in the "
    "provided text?"
)
NIAH_PREFIX = " The special magic {values} for {query} mentioned in the provided text are"
NEEDLE = "One of the special magic {values} for {key} is: {value}."
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
VT_TEMPLATE = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\nQuestion: Find "
    "all variables that are assigned the value {query} in the text above."
)
VT_PREFIX = (
    " Answer: According to the chain(s) of variable assignment in the text above, {count} variables are assigned the "
    "value {query}, they are: "
)
CWE_TEMPLATE = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
    "appear most often.\n{context}\nQuestion: What are the 10 most common words in the above list?"
)
CWE_PREFIX = " Answer: The top 10 words that appear most often in the list are:"
FWE_TEMPLATE = (
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared "
    "coded words. {context}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the "
    "three most frequently appeared words in the above coded text?"
)
FWE_PREFIX = " Answer: According to the coded text above, the three most frequently appeared words are:"
QA_ORDER = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words."
)
QA_TEMPLATE = QA_ORDER + "\n\nThe following are given documents.\n\n{context}\n\n" + QA_ORDER + "\n\nQuestion: {query}"
QA_PREFIX = " Answer:"


@dataclass(frozen=True)
class Task:
    """One configuration. A variant is not RULER's and says so behind its name."""

    name: str
    """RULER's, with @synthetic, @shuffle and @grid behind it."""
    family: str
    """niah, vt, cwe, fwe or qa."""
    generated_tokens: int
    """Tokens kept free for the answer."""
    prefix: str
    """The answer's beginning, behind the prompt."""
    source: str = ""
    """niah: essay, noise or needle; qa: squad or hotpotqa."""
    keys: str = "words"
    """niah: words or uuids."""
    values: str = "numbers"
    """niah: numbers or uuids."""
    num_keys: int = 1
    num_values: int = 1
    """Values of each key."""
    num_queries: int = 1

    @property
    def synthetic(self) -> bool:
        return SYNTHETIC in self.name

    @property
    def grid(self) -> bool:
        return GRID in self.name

    @property
    def keyed(self) -> bool:
        """Whether a sample is drawn from (seed, sample) alone; RULER draws all from one stream."""
        return SHUFFLE in self.name or self.grid

    @property
    def dialect(self) -> str:
        """RULER, and what stands behind the task's name."""
        return DIALECT + self.name[len(self.name.partition("@")[0]) :]

    @property
    def metric(self) -> str:
        """`part` where any one reference is enough, `all` where the share of references counts."""
        return "part" if self.family == "qa" else "all"


def _niah(name: str, source: str, keys: str = "words", values: str = "numbers", **counts: int) -> Task:
    return Task(name, "niah", 128, NIAH_PREFIX, source, keys, values, **counts)


RULER_TASKS = {
    task.name: task
    for task in (
        _niah("niah_single_1", "noise"),
        _niah("niah_single_2", "essay"),
        _niah("niah_single_3", "essay", values="uuids"),
        _niah("niah_multikey_1", "essay", num_keys=4),
        _niah("niah_multikey_2", "needle"),
        _niah("niah_multikey_3", "needle", keys="uuids", values="uuids"),
        _niah("niah_multivalue", "essay", num_values=4),
        _niah("niah_multiquery", "essay", num_keys=4, num_queries=4),
        Task("vt", "vt", 30, VT_PREFIX),
        Task("cwe", "cwe", 120, CWE_PREFIX),
        Task("fwe", "fwe", 50, FWE_PREFIX),
        Task("qa_1", "qa", 32, QA_PREFIX, "squad"),
        Task("qa_2", "qa", 32, QA_PREFIX, "hotpotqa"),
    )
}


SYNTHETIC_TASKS = {
    task.name + SYNTHETIC: replace(task, name=task.name + SYNTHETIC)
    for task in RULER_TASKS.values()
    if task.source in ("essay", "squad", "hotpotqa")
}
# Tasks whose evidence RULER puts into the same slots in every sample.
SHUFFLE_TASKS = {
    task.name + SHUFFLE: replace(task, name=task.name + SHUFFLE)
    for task in (RULER_TASKS | SYNTHETIC_TASKS).values()
    if task.family in ("cwe", "fwe", "qa")
}


def find_task(name: str, edition: str = EDITION, grid: bool = False) -> Task:
    """The task called `name`, with its evidence at given depths where `grid`; ValueError when there is none."""
    tasks = RULER_TASKS | SYNTHETIC_TASKS | SHUFFLE_TASKS
    if name not in tasks:
        raise ValueError(f"--task {name}: the tasks are {', '.join(tasks)}")
    task = tasks[name]
    if grid and task.family not in ("niah", "vt"):
        raise ValueError(f"--grid --task {name}: only niah and vt have evidence that can be put at a depth")
    if grid:
        task = replace(task, name=task.name + GRID)
    if edition not in EDITIONS:
        raise ValueError(f"--edition {edition}: the editions are {' and '.join(EDITIONS)}")
    if edition != EDITION and task.keyed:
        raise ValueError(f"--edition {edition} has no {task.name}: leave --edition out")
    return task
