"""The page's building blocks: what goes in as text comes out as text, and nothing is loaded from elsewhere."""

from __future__ import annotations

import base64
from html.parser import HTMLParser

import pytest

from megatron_rpsd.report import html

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
NASTY = "<script>alert('x')</script> & \"quoted\""


class Reader(HTMLParser):
    """Independent of the module: Python's own parser."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.unbalanced: list[str] = []
        self.text: list[str] = []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.unbalanced.append(tag)

    def handle_data(self, data):
        self.text.append(data)


def everything(word: str) -> str:
    return html.page(
        word,
        html.paragraph(word, " and ", word),
        html.section(word, html.table([word, word], [[word, 3]], word), html.figure(PNG, word, word)),
        html.code_block(word),
        word,
    )


def test_every_text_is_escaped() -> None:
    reader = Reader(everything(NASTY))
    assert "script" not in [tag for tag, _ in reader.tags]
    # title, h1, paragraph twice, h2, two header cells, cell, caption, figcaption, code, bare block
    assert "".join(reader.text).count(NASTY) == 12
    assert [attributes["alt"] for tag, attributes in reader.tags if tag == "img"] == [NASTY]


def test_tags_are_balanced() -> None:
    reader = Reader(everything("word"))
    assert not reader.unbalanced and not reader.open


def test_the_page_loads_nothing() -> None:
    for tag, attributes in Reader(everything("word")).tags:
        assert tag not in ("script", "link", "iframe", "object")
        assert "href" not in attributes
        assert attributes.get("src", "data:").startswith("data:")
    assert "url(" not in everything("word") and "@import" not in everything("word")


def test_the_figure_holds_the_png() -> None:
    (source,) = [attributes["src"] for tag, attributes in Reader(html.figure(PNG, "c", "a")).tags if tag == "img"]
    kind, data = source.split(",", 1)
    assert kind == "data:image/png;base64" and base64.b64decode(data, validate=True) == PNG


def test_a_table_aligns_its_numbers() -> None:
    tags = Reader(html.table(["a", "b", "c"], [["x", "y", 1]], text_columns=2)).tags
    assert [attributes.get("class") for tag, attributes in tags if tag == "td"] == [None, None, "number"]


def test_what_is_not_a_table_or_a_png_is_refused() -> None:
    with pytest.raises(AssertionError):
        html.table(["a", "b"], [["x"]])
    with pytest.raises(AssertionError):
        html.figure(b"GIF89a", "c", "a")
