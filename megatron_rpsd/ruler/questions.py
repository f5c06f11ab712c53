"""QA: the documents that answer a question, among others."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_rpsd.ruler.prompts import Draws, Family, Prompt, fill, join_parts, shift
from megatron_rpsd.ruler.sources import Sources
from megatron_rpsd.ruler.synthetic import SyntheticSources
from megatron_rpsd.ruler.tasks import QA_PREFIX, QA_TEMPLATE, Task


@dataclass(frozen=True)
class Question:
    """Numbers are indices of the sorted documents."""

    query: str
    outputs: tuple[str, ...]
    gold: list[int]
    """Documents that every prompt has."""
    more: list[int]
    """Documents taken next."""
    evidence: frozenset[int]
    """Documents among `gold` that hold the answer or lead to it."""


def read_squad(squad: dict) -> tuple[list[str], list[Question]]:
    """Distinct paragraphs, sorted; the answerable questions, in file order."""
    documents = sorted({paragraph["context"] for article in squad["data"] for paragraph in article["paragraphs"]})
    number = {document: place for place, document in enumerate(documents)}
    questions = []
    for article in squad["data"]:
        siblings = [number[paragraph["context"]] for paragraph in article["paragraphs"]]
        for paragraph in article["paragraphs"]:
            own = number[paragraph["context"]]
            more = [place for place in siblings if place != own]
            questions += [
                Question(
                    entry["question"],
                    tuple(answer["text"] for answer in entry["answers"]),
                    [own],
                    more,
                    frozenset([own]),
                )
                for entry in paragraph["qas"]
                if not entry["is_impossible"]
            ]
    return documents, questions


def read_hotpotqa(items: list[dict]) -> tuple[list[str], list[Question]]:
    """Distinct documents, title line and text, sorted; the questions, in file order."""
    written = [[f"{title}\n{''.join(sentences)}" for title, sentences in item["context"]] for item in items]
    documents = sorted({document for own in written for document in own})
    number = {document: place for place, document in enumerate(documents)}
    questions = []
    for item, own in zip(items, written, strict=True):
        titles = {title for title, _ in item["supporting_facts"]}
        gold = [number[document] for document in own]
        leading = (place for place, (title, _) in zip(gold, item["context"], strict=True) if title in titles)
        questions.append(Question(item["question"], (item["answer"],), gold, [], frozenset(leading)))
    return documents, questions


class Questions(Family):
    """Sample i asks question i; sizes count documents."""

    unit, step = "documents", 10

    def __init__(self, task: Task, length: int, draws: Draws, sources: Sources | SyntheticSources) -> None:
        super().__init__(task, length, draws)
        read = read_squad(sources.squad) if task.source == "squad" else read_hotpotqa(sources.hotpotqa)
        self.documents, self.questions = read
        self.max_samples = len(self.questions)

    def begin(self, index: int) -> Question:
        return self.questions[index]

    def _choose(self, size: int, question: Question) -> list[int]:
        """Document numbers in the order before shuffling; documents repeat once there are no others."""
        if size >= len(self.documents):
            everything = list(range(len(self.documents)))
            return (everything * -(-size // len(everything)))[:size]
        gold, more = question.gold, question.more
        if size - len(gold) <= len(more):
            return gold + self.draws.random.sample(more, size - len(gold))
        taken = {*gold, *more}
        others = [place for place in range(len(self.documents)) if place not in taken]
        return gold + more + self.draws.random.sample(others, size - len(gold) - len(more))

    def probe(self, size: int, sample: Question) -> Prompt | None:
        if size < len(sample.gold):
            return None
        chosen = self._choose(size, sample)
        self.draws.private_shuffle(chosen)
        parts = [f"Document {slot}:\n{self.documents[place]}" for slot, place in enumerate(chosen, start=1)]
        context, starts = join_parts(parts, "\n\n")
        text, offset = fill(QA_TEMPLATE + QA_PREFIX, context, query=sample.query)
        held = [
            (start + len(part) - len(self.documents[place]), start + len(part))
            for place, start, part in zip(chosen, starts, parts, strict=True)
            if place in sample.evidence
        ]
        return Prompt(text, sample.outputs, (shift(held, offset),) * len(sample.outputs))
