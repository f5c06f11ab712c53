"""Building blocks of a self-contained HTML page: no external resource, every text escaped.

Functions return `Markup`; where a block is expected, anything else is text and is escaped.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; margin: 0 auto; max-width: 62rem;
       padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .5rem; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .5rem; border-bottom: 1px solid #d0d0d0; padding-bottom: .2rem; }
table { border-collapse: collapse; margin: .8rem 0; font-variant-numeric: tabular-nums; }
caption { caption-side: bottom; text-align: left; color: #555; font-size: .87rem; padding-top: .4rem; }
th, td { padding: .3rem .9rem .3rem 0; border-bottom: 1px solid #e4e4e4; text-align: left; vertical-align: top; }
th { font-weight: 600; }
th.number, td.number { text-align: right; white-space: nowrap; }
figure { margin: 1rem 0; }
figure img { max-width: 100%; height: auto; }
figcaption { color: #555; font-size: .87rem; }
pre { background: #f5f5f5; padding: .7rem .9rem; font-size: .8rem; line-height: 1.4; white-space: pre-wrap;
      overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
"""


class Markup(str):
    """HTML that is already escaped."""


def text(value: object) -> Markup:
    """`value` as escaped text; Markup stays as it is."""
    return value if isinstance(value, Markup) else Markup(html.escape(str(value)))


def paragraph(*parts: object) -> Markup:
    """A paragraph of the parts, one after the other."""
    return Markup(f"<p>{''.join(text(part) for part in parts)}</p>")


def code_block(lines: object) -> Markup:
    """Text in a fixed-width font, line breaks kept."""
    return Markup(f"<pre>{text(lines)}</pre>")


def table(
    header: Sequence[object], rows: Sequence[Sequence[object]], caption: str = "", text_columns: int = 1
) -> Markup:
    """A table; columns from `text_columns` on hold numbers and are aligned to the right."""
    assert all(len(row) == len(header) for row in rows), "every row has a cell for every column"

    def cells(row: Sequence[object], name: str) -> str:
        return "".join(
            f"<{name}{' class=number' if column >= text_columns else ''}>{text(cell)}</{name}>"
            for column, cell in enumerate(row)
        )

    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    below = f"<caption>{text(caption)}</caption>" if caption else ""
    head = f"<thead><tr>{cells(header, 'th')}</tr></thead>"
    return Markup(f"<div class=scroll><table>{below}{head}<tbody>{body}</tbody></table></div>")


def figure(png: bytes, caption: str, alternative: str) -> Markup:
    """A PNG inside the page. `alternative` says in words what it shows."""
    assert png.startswith(b"\x89PNG\r\n\x1a\n"), "the figure is not a PNG"
    data = base64.b64encode(png).decode("ascii")
    image = f'<img alt="{html.escape(alternative)}" src="data:image/png;base64,{data}">'
    return Markup(f"<figure>{image}<figcaption>{text(caption)}</figcaption></figure>")


def section(heading: str, *blocks: object) -> Markup:
    """A heading and what stands under it."""
    return Markup(f"<section><h2>{text(heading)}</h2>\n" + "\n".join(text(block) for block in blocks) + "</section>")


def page(title: str, *blocks: object, width: str = "62rem") -> str:
    """The whole document, its column at most `width` wide (CSS)."""
    body = "\n".join(text(block) for block in blocks)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(title)}</title>\n<style>{_STYLE}body {{ max-width: {width}; }}\n</style>\n</head>\n"
        f"<body>\n<h1>{text(title)}</h1>\n{body}\n"
        "</body>\n</html>\n"
    )
