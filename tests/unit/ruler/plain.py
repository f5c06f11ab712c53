"""NIAH in essays and QA once more, written straight from the protocol: one stream, one prompt at a time, no spans.

Shares with the library the word pairs and the sentence splitter, which have tests of their own.
"""

from __future__ import annotations

import json
import random
import uuid
from collections.abc import Callable

import numpy as np
import punkt

ONE = (
    "A special magic {t} is hidden within the following text. Make sure to memorize it. I will quiz you about the {t} "
    "afterwards.\n{c}\nWhat is the special magic {t} for {q} mentioned in the provided text?",
    " The special magic {t} for {q} mentioned in the provided text is",
)
MANY = (
    "Some special magic {t} are hidden within the following text. Make sure to memorize it. I will quiz you about the "
    "{t} afterwards.\n{c}\nWhat are all the special magic {t} for {q} mentioned in the provided text?",
    " The special magic {t} for {q} mentioned in the provided text are",
)
ASK = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words.\n\n"
    "The following are given documents.\n\n{c}\n\nAnswer the question based on the given documents. Only give me the "
    "answer and do not output any other words.\n\nQuestion: {q}",
    " Answer:",
)


def _samples(make: Callable, count: Callable[[str], int], length: int, gen: int, inc: int, number: int) -> list:
    """`make(i, size)` gives (prompt, prefix, answers); the fit and the samples as RULER runs them."""

    def tokens(i: int, size: int) -> tuple:
        prompt, prefix, answers = make(i, size)
        return count(prompt + prefix) + gen, prompt, prefix, answers

    low, best = inc, inc
    high = max(int((length / ((tokens(0, inc)[0] - gen) / inc)) * 3), 2 * inc)
    while low <= high:
        mid = (low + high) // 2
        if tokens(0, mid)[0] <= length:
            best, low = mid, mid + 1
        else:
            high = mid - 1
    made = []
    for i in range(number):
        size = best
        while (built := tokens(i, size))[0] > length:
            assert size > inc
            size -= inc
        made.append(built)
    return made


def niah_essay(words: list[str], pool, kind: str, k: int, v: int, q: int, count, length: int, number: int) -> str:
    random.seed(42)
    depths = np.round(np.linspace(0, 100, 40)).astype(int).tolist()

    def value() -> str:
        if kind == "numbers":
            return str(random.randint(1000000, 9999999))
        return str(uuid.UUID(int=random.getrandbits(128), version=4))

    def make(_: int, size: int) -> tuple:
        table = []
        for _ in range(k):
            key = random.choice(pool)
            table.append((key, [value() for _ in range(v)]))
        needles = [f"One of the special magic {kind} for {key} is: {one}." for key, ones in table for one in ones]
        random.Random(42).shuffle(needles)
        stock = list(words)
        while len(stock) < size:
            stock += words
        rest = punkt.sent_tokenize(" ".join(stock[:size]).strip())
        total, taken, out = len(rest), 0, ""
        for needle, at in zip(
            needles, sorted(int(total * (d / 100)) for d in random.sample(depths, len(needles))), strict=True
        ):
            out += " ".join(rest[taken:at]) + " " + needle + " "
            taken = at
        out += " ".join(rest[taken:])
        asked = [table[i] for i in random.sample(range(k), q)]
        names = [key for key, _ in asked]
        query = names[0] if q == 1 else ", ".join(names[:-1]) + ", and " + names[-1]
        template, prefix = ONE if q * v == 1 else MANY
        label = kind[:-1] if q * v == 1 else kind
        prompt = template.replace("{t}", label).replace("{q}", query).replace("{c}", out)
        return prompt, prefix.replace("{t}", label).replace("{q}", query), [one for _, ones in asked for one in ones]

    lines = []
    for tokens, prompt, prefix, answers in _samples(make, count, length, 128, 500, number):
        at = prompt.find(answers[0])
        line = {"index": at, "input": prompt, "outputs": answers, "length": tokens, "length_w_model_temp": tokens}
        lines.append(line | {"answer_prefix": prefix, "token_position_answer": count(prompt[:at])})
    return "".join(json.dumps(line) + "\n" for line in lines)


def squad_items(squad: dict) -> list[tuple[str, list[str], list[str], list[str]]]:
    """(question, answers, gold, more), as texts."""
    items = []
    for article in squad["data"]:
        for paragraph in article["paragraphs"]:
            own = paragraph["context"]
            more = [other["context"] for other in article["paragraphs"] if other["context"] != own]
            for entry in paragraph["qas"]:
                if not entry["is_impossible"]:
                    items.append((entry["question"], [a["text"] for a in entry["answers"]], [own], more))
    return items


def squad_documents(squad: dict) -> list[str]:
    return sorted({paragraph["context"] for article in squad["data"] for paragraph in article["paragraphs"]})


def hotpot_items(data: list[dict]) -> list[tuple[str, list[str], list[str], list[str]]]:
    return [(d["question"], [d["answer"]], [t + "\n" + "".join(s) for t, s in d["context"]], []) for d in data]


def hotpot_documents(data: list[dict]) -> list[str]:
    return sorted({t + "\n" + "".join(s) for d in data for t, s in d["context"]})


def qa(items: list, docs: list[str], count, length: int, number: int) -> str:
    random.seed(42)
    places = {text: i for i, text in enumerate(docs)}

    def make(i: int, size: int) -> tuple:
        question, answers, gold, more = items[i]
        if size >= len(docs):
            chosen = [docs[j % len(docs)] for j in range(size)]
        elif size - len(gold) > len(more):
            known = {places[text] for text in gold + more}
            others = [j for j in range(len(docs)) if j not in known]
            chosen = gold + more + [docs[j] for j in random.sample(others, size - len(gold) - len(more))]
        else:
            chosen = gold + random.sample(more, size - len(gold))
        random.Random(42).shuffle(chosen)
        context = ""
        for number_of, text in enumerate(chosen):
            context += ("\n\n" if number_of else "") + "Document " + str(number_of + 1) + ":\n" + text
        return ASK[0].replace("{q}", question).replace("{c}", context), ASK[1], answers

    lines = []
    for i, (tokens, prompt, prefix, answers) in enumerate(_samples(make, count, length, 32, 10, number)):
        line = {"index": i, "input": prompt, "outputs": answers, "length": tokens, "length_w_model_temp": tokens}
        lines.append(line | {"answer_prefix": prefix})
    return "".join(json.dumps(line) + "\n" for line in lines)
