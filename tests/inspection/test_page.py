"""The page of a dry run: well-formed, self-contained, and text from data is text in it."""

from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from halos.inspection import lengths, page, rows
from halos.inspection.facts import Fact, Facts, Reason, SourceFacts
from halos.inspection.findings import Check, Finding
from halos.inspection.histogram import drawn
from halos.inspection.html import tag, text
from halos.types import Comparison
from tests.data.tokenizers import jsonl, prepared, tokenizer

HOSTILE = "</script><img src=x onerror=alert(1)> \"quoted\" & 'so' \u202e\x1b[31m\n\tend"
VOID = {"meta"}


class Reader(HTMLParser):
    """Collects elements and text, and holds that every element is closed in its turn."""

    def __init__(self, markup: str) -> None:
        super().__init__()
        self.open, self.tags, self.words, self.attributes = list[str](), list[str](), list[str](), list[tuple[str, str]]()
        self.feed(markup)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID | {"wbr"}:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return "".join(self.words)


def facts_of(place: Path, prompt: str = "Who is it?") -> Facts:
    """Facts with one of everything, of pairs that hold `prompt`."""
    table = [{"prompt": f"{prompt} {n}", "chosen": "me " * n + prompt, "rejected": "you"} for n in range(1, 9)]
    data, names = prepared(jsonl(place / "a.jsonl", table), place, kind=Comparison), Comparison.completed
    renderer = rows.Renderer(tokenizer())
    return Facts(
        title=f"first, dpo {prompt}", overrides=(f"exp_name={prompt}",), run=f"runs/{prompt}", header=(("WARNING", prompt),),
        covers="everything", max_length=40, work=(Fact("steps", prompt, prompt),),
        checks=(Check(prompt, (Finding("warning", prompt, (prompt,), prompt),)), Check("well")),
        sources=(SourceFacts("train", prompt, 9, 9, 8, (Reason(prompt, 1, (prompt,)),)),),
        lengths=tuple(lengths.histograms("train", data, names)),
        rows=tuple(renderer.row(*chosen, names) for chosen in rows.choose([("train", data)], 20)),
    )  # fmt: skip


def test_text_from_data_is_text_in_the_page(tmp_path: Path) -> None:
    markup = page.written(facts_of(tmp_path, HOSTILE))
    read = Reader(markup)
    assert not {"script", "img", "iframe", "link"} & set(read.tags)
    assert not {name for name, _ in read.attributes if name.startswith("on")}
    assert "</script><img src=x onerror=alert(1)>" in read.text, "in the header, escaped"
    assert "\u202e" not in markup
    assert "\x1b" not in markup
    assert "\\u202e" in read.text


def test_the_page_is_self_contained_and_follows_the_readers_colours(tmp_path: Path) -> None:
    markup = page.written(facts_of(tmp_path))
    read = Reader(markup)
    assert not [value for name, value in read.attributes if name in ("src", "srcset", "action") or "://" in value]
    assert [value for name, value in read.attributes if name == "href" if not value.startswith("#")] == []
    assert "@import" not in markup
    assert "url(" not in markup
    assert "prefers-color-scheme: dark" in markup
    assert "@media print" in markup
    assert [read.tags.count(name) for name in ("h1", "title", "main")] == [1, 1 + read.tags.count("rect") + 1, 1]
    links = {value[1:] for name, value in read.attributes if name == "href"}
    assert links <= {value for name, value in read.attributes if name == "id"}
    assert read.tags.count("svg") == [name for name, _ in read.attributes].count("role"), "every picture is described"


def test_every_completion_is_shown_token_by_token_with_what_is_scored(tmp_path: Path) -> None:
    facts = facts_of(tmp_path)
    assert {row.why for row in facts.rows} >= {"the shortest", "the longest"}
    assert len({row.place for row in facts.rows}) == len(facts.rows) == 8
    first = facts.rows[0]
    assert [part.name for part in first.parts] == ["prompt", "chosen", "rejected"]
    assert "".join(token.text for token, _ in first.parts[1].tokens) == "me Who is it?<|im_end|>"
    assert {kind for _, kind in first.parts[0].tokens} == {"prompt"}
    assert [part.scored for part in first.parts] == [0, first.parts[1].length, first.parts[2].length]
    *_, (end, kind) = first.parts[1].tokens
    assert (end.special, kind) == (True, "scored")
    assert f'class="s x" title="id {end.id}, scored, special">&lt;|im_end|&gt;' in page.written(facts)


def test_tokens_keep_their_blanks_and_parts_of_characters_are_named() -> None:
    used = tokenizer()
    renderer = rows.Renderer(used)
    ids = used("a b\n€", add_special_tokens=False)["input_ids"]
    shown = [renderer.token(each) for each in ids]
    assert "".join(token.text for token in shown if not token.partial) == "a b\n"
    assert sum(token.partial for token in shown) == 3, "the bytes of one character"
    part = rows.Renderer(used).prompt(np.arange(2 * rows.LONGEST) % 50)
    assert (part.length, len(part.tokens), part.gap_at) == (2 * rows.LONGEST, rows.LONGEST, rows.LONGEST // 2)


def test_rows_are_of_every_source_and_of_all_lengths(tmp_path: Path) -> None:
    table = [[{"prompt": "Who", "completion": "one " * (n + 1 + 30 * source)} for n in range(30)] for source in range(2)]
    data = prepared([jsonl(tmp_path / f"{n}.jsonl", each) for n, each in enumerate(table)], tmp_path)
    chosen = rows.choose([("train", data)], 10)
    numbers = [row for _, _, row, _ in chosen]
    assert len(set(numbers)) == len(numbers) == 10
    assert sorted(data.sources[numbers].tolist()) == [0] * 5 + [1] * 5
    assert {0, 29, 30, 59} <= set(numbers), "the shortest and the longest of both"


def test_a_histogram_counts_every_length_and_marks_the_limit() -> None:
    found = lengths.histogram("train", "prompt", np.array([0, 3, 3, 99]))
    assert (found.counts.sum(), found.most, found.counts[0], found.counts[1]) == (4, 99, 1, 2)
    assert "limit" in drawn(found, 110)
    far = drawn(found, 4096)
    assert 'class="limit"' not in far
    assert "max_length 4096 (beyond the axis)" in far


def test_only_markup_made_here_is_markup() -> None:
    assert tag("p", "<b>", tag("b", "x"), title='"') == '<p title="&quot;">&lt;b&gt;<b>x</b></p>'
    assert text("\u2028\x00") == "\\u2028\\u0000"


@pytest.mark.parametrize(
    ("level", "said"), [("error", "would be refused"), ("warning", "would start. 1 of 1"), ("note", "would start.")]
)
def test_the_page_begins_with_the_verdict(level: str, said: str) -> None:
    facts = Facts("t", (), "runs/t", (), "", checks=(Check("well", (Finding(level, "x"),)),))  # pyrefly: ignore[bad-argument-type]
    assert said in page.written(facts)
