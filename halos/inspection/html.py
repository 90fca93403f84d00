"""The few means of writing HTML that a page needs: escaped text, elements, tables. Everything from data goes through `text`."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence

# control characters, lone surrogates, and marks that reorder or hide text: shown by their numbers
INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]")


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


def text(words: object) -> Html:
    """Escape text for an element or a quoted attribute."""
    if isinstance(words, Html):
        return words
    return Html(html.escape(INVISIBLE.sub(lambda found: f"\\u{ord(found[0]):04x}", str(words)), quote=True))


def tag(name: str, *content: object, **attributes: object) -> Html:
    """Return an element; `class_` and `aria_label` become class and aria-label."""
    written = "".join(f' {key.rstrip("_").replace("_", "-")}="{text(value)}"' for key, value in attributes.items())
    return Html(f"<{name}{written}>{''.join(map(text, content))}</{name}>")


def joined(parts: Iterable[object], between: str = "") -> Html:
    return Html(between.join(map(text, parts)))


def table(caption: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Html:
    """Return a table with a caption and column headers; the first cell of a row is its header."""
    head = tag("thead", tag("tr", *(tag("th", name, scope="col") for name in columns)))
    body = [tag("tr", tag("th", first, scope="row"), *(tag("td", cell) for cell in others)) for first, *others in rows]
    return tag("div", tag("table", tag("caption", caption), head, tag("tbody", *body)), class_="wide")
