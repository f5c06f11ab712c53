"""The 13 tasks of RULER (arXiv 2404.06654), edition 2025-07: what each draws, and the protocol's exact words."""

from __future__ import annotations

from dataclasses import dataclass, replace

DIALECT = "RULER"
EDITION = "2025-07"
SYNTHETIC = "@synthetic"

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
    """One configuration. A task that reads a synthetic text or synthetic questions is not RULER's and says so."""

    name: str
    """RULER's, with @synthetic behind it where the texts are this library's own."""
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
        return self.name.endswith(SYNTHETIC)

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


def find_task(name: str) -> Task:
    """The task called `name`; ValueError when there is none."""
    tasks = RULER_TASKS | SYNTHETIC_TASKS
    if name not in tasks:
        raise ValueError(f"--task {name}: the tasks are {', '.join(tasks)}")
    return tasks[name]
