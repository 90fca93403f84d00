"""The page of a dry run: one HTML file without scripts, which loads nothing and shows text from data as text."""

from collections.abc import Iterable

from halos.inspection.facts import Fact, Facts, Part, Reason, ShownRow, SourceFacts, Token, TokenKind
from halos.inspection.findings import Check, Finding
from halos.inspection.histogram import drawn
from halos.inspection.html import Html, joined, table, tag, text
from halos.inspection.lengths import WHOLE
from halos.inspection.style import STYLE
from halos.redaction import redact

CLASSES: dict[TokenKind, str] = {"prompt": "p", "scored": "s", "unscored": "n"}
WORDS = {"error": "error", "warning": "warning", "note": "note", None: "holds"}
SECURITY = "default-src 'none'; style-src 'unsafe-inline'"  # nothing is fetched, whatever the data hold


def written(facts: Facts) -> str:
    """Return the whole page."""
    title = f"Dry run: {facts.title}"
    head = tag("head", Html('<meta charset="utf-8">'),
               Html(f'<meta http-equiv="Content-Security-Policy" content="{text(SECURITY)}">'),
               Html('<meta name="viewport" content="width=device-width, initial-scale=1">'),
               tag("title", title), tag("style", Html(STYLE)))  # fmt: skip
    sections = [
        ("checks", "Checks", _checks(facts)),
        ("header", "The header, as a run logs it", _header(facts)),
        ("data", "Rows", _sources(facts.sources)),
        ("lengths", "Lengths", _lengths(facts)),
        ("needs", "Steps, memory, time and disk", _needs(facts)),
        ("rows", "Rows as the model gets them", _rows(facts.rows)),
    ]
    shown = [(name, heading, body) for name, heading, body in sections if body]
    nav = tag("nav", *(tag("a", heading, href=f"#{name}") for name, heading, _ in shown), aria_label="Sections")
    parts = [tag("section", tag("h2", heading, id=name), body, aria_labelledby=name) for name, heading, body in shown]
    body = tag("body", tag("header", tag("h1", title), _start(facts), nav), tag("main", *parts))
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def _start(facts: Facts) -> Html:
    levels = [check.level for check in facts.checks]
    errors, warnings = levels.count("error"), levels.count("warning")
    if errors:
        verdict = tag("p", "This run would be refused: see the checks.", class_="verdict error")
    elif warnings:
        verdict = tag("p", f"This run would start. {warnings} of {len(levels)} checks warn.", class_="verdict warning")
    else:
        verdict = tag("p", "This run would start.", class_="verdict hold")
    overridden = tag("pre", redact("\n".join(facts.overrides))) if facts.overrides else tag("p", "nothing", class_="soft")
    place = tag("p", "Run directory: ", tag("code", facts.run), class_="soft")
    title = tag("h3", "Overridden on the command line")
    return joined([verdict, place, tag("p", facts.covers, class_="soft"), title, overridden])


def _header(facts: Facts) -> Html:
    lines = [tag("span", line, class_="warning") if level == "WARNING" else text(line) for level, line in facts.header]
    return tag("pre", joined(lines, "\n")) if lines else Html()


def _checks(facts: Facts) -> Html:
    order = ["error", "warning", "note", None]
    checks = sorted(facts.checks, key=lambda check: order.index(check.level))
    return table("What was looked for in the data and the chat template, and what was found", ("check", "result", "found"),
                 [_check(check) for check in checks]) if checks else Html()  # fmt: skip


def _check(check: Check) -> tuple[object, ...]:
    level = tag("span", WORDS[check.level], class_=check.level or "hold")
    return check.name, level, joined([_finding(each) for each in check.findings])


def _finding(finding: Finding) -> Html:
    places = (
        tag("p", "at ", joined((tag("code", place) for place in finding.places), ", "), class_="soft") if finding.places else ""
    )
    return joined([tag("p", finding.text), places, tag("p", f"Remedy: {finding.remedy}") if finding.remedy else ""])


def _sources(sources: Iterable[SourceFacts]) -> Html:
    rows = [
        (f"{each.name} ({each.split})", each.rows, each.examples, each.kept, _reasons(each.dropped), _reasons(each.changed))
        for each in sources
    ]
    columns = ("source", "rows read", "examples", "kept", "dropped", "cut, or otherwise than usual")
    return table("What became of the rows; places are the first few", columns, rows) if rows else Html()


def _reasons(reasons: Iterable[Reason]) -> Html:
    items = [tag("li", f"{each.count} {each.text}", *([": ", tag("code", ", ".join(each.places))] if each.places else []))
             for each in reasons]  # fmt: skip
    return tag("ul", *items) if items else text("none")


def _lengths(facts: Facts) -> Html:
    figures = [drawn(each, facts.max_length if each.part == WHOLE else None) for each in facts.lengths]
    return tag("div", *figures, class_="figures") if figures else Html()


def _needs(facts: Facts) -> Html:
    tables = [(facts.work, "Work"), (facts.memory, "Memory at the peak, estimated from shapes"), (facts.versions, "Versions")]
    return joined(_facts(caption, rows) for rows, caption in tables if rows)


def _facts(caption: str, rows: Iterable[Fact]) -> Html:
    return table(
        caption, ("what", "how much", "note"), [(each.name, each.value, tag("span", each.note, class_="soft")) for each in rows]
    )


# --- rows --------------------------------------------------------------------------------------------------------------


def _rows(rows: Iterable[ShownRow]) -> Html:
    articles = [_row(row) for row in rows]
    if not articles:
        return Html()
    key = tag("p", tag("span", "prompt", class_="p"), tag("span", "scored: the loss reads its log-prob", class_="s"),
              tag("span", "not scored", class_="n"), tag("span", "special token", class_="x"),
              "A blank is ·, a tab →, the end of a line ↵. Hover over a token for its id.", class_="key soft")  # fmt: skip
    return joined([key, *articles])


def _row(row: ShownRow) -> Html:
    labels = "".join(f", {name} {value:g}" for name, value in row.labels)
    heading = tag("h3", tag("code", row.place), f" {row.split}, {row.why}{labels}")
    return tag("article", heading, *(_part(part) for part in row.parts))


def _part(part: Part) -> Html:
    count = f"{part.length} token{'' if part.length == 1 else 's'}"
    if part.name != "prompt":
        count += f", {part.scored} scored"
    tokens = [_token(token, kind) for token, kind in part.tokens]
    if part.gap_at is not None:
        tokens.insert(part.gap_at, tag("span", f" [{part.length - len(part.tokens)} tokens are not shown] ", class_="gap"))
    return joined([tag("h4", part.name, " ", tag("span", count)), tag("p", *tokens, class_="tokens")])


def _token(token: Token, kind: TokenKind) -> Html:
    title = f"id {token.id}, {kind}{', special' if token.special else ''}{', part of a character' if token.partial else ''}"
    shown = joined(map(_visible, token.text)) if not token.special else text(token.text)
    return tag(
        "span", shown if token.text else tag("i", "∅"), class_=CLASSES[kind] + (" x" if token.special else ""), title=title
    )


BLANKS = {" ": "<i>·</i><wbr>", "\n": "<i>↵</i>\n", "\t": "<i>→</i>\t", "\r": "<i>\\r</i>"}


def _visible(character: str) -> Html:
    return Html(BLANKS[character]) if character in BLANKS else text(character)
