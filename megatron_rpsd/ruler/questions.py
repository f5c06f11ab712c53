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


def _skip(place: int, taken: list[int]) -> int:
    """The number of the document that is at `place` among those that are not in `taken` (ascending)."""
    for number in taken:
        if number > place:
            break
        place += 1
    return place


def read_questions(task: Task, sources: Sources | SyntheticSources) -> tuple[list[str], list[Question]]:
    """The task's documents and questions."""
    return read_squad(sources.squad) if task.source == "squad" else read_hotpotqa(sources.hotpotqa)


class Questions(Family):
    """Sample i asks question i; sizes count documents."""

    unit, step = "documents", 10

    def __init__(self, task: Task, length: int, draws: Draws, documents: list[str], questions: list[Question]) -> None:
        super().__init__(task, length, draws)
        self.documents, self.questions = documents, questions
        self.max_samples = len(questions)
        self.fewest = max(len(question.gold) for question in questions)

    def begin(self, index: int) -> Question:
        return self.questions[index]

    def smaller(self, size: int) -> int | None:
        """Where RULER asks for fewer documents than a prompt has at least, and never ends, those it has at least."""
        after = super().smaller(size)
        if after is None or after >= self.fewest:
            return after
        self.beyond_ruler = True
        return self.fewest if size > self.fewest else None

    def arrange(self, size: int, question: Question) -> list[int]:
        """Document numbers as they stand in a prompt; documents repeat once there are no others."""
        chosen = self._choose(size, question)
        self.draws.private_shuffle(chosen)
        return chosen

    def _choose(self, size: int, question: Question) -> list[int]:
        if size >= len(self.documents):
            everything = list(range(len(self.documents)))
            return (everything * -(-size // len(everything)))[:size]
        gold, more = question.gold, question.more
        if size - len(gold) <= len(more):
            return gold + self.draws.random.sample(more, size - len(gold))
        taken = sorted({*gold, *more})
        # The draws depend on how many others there are, not on what they are.
        drawn = self.draws.random.sample(range(len(self.documents) - len(taken)), size - len(gold) - len(more))
        return gold + more + [_skip(place, taken) for place in drawn]

    def probe(self, size: int, sample: Question) -> Prompt | None:
        if size < len(sample.gold):
            return None
        chosen = self.arrange(size, sample)
        parts = [f"Document {slot}:\n{self.documents[place]}" for slot, place in enumerate(chosen, start=1)]
        context, starts = join_parts(parts, "\n\n")
        text, offset = fill(QA_TEMPLATE + QA_PREFIX, context, query=sample.query)
        held = [
            (start + len(part) - len(self.documents[place]), start + len(part))
            for place, start, part in zip(chosen, starts, parts, strict=True)
            if place in sample.evidence
        ]
        return Prompt(text, sample.outputs, (shift(held, offset),) * len(sample.outputs))
