from datetime import date, datetime
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from halos.data.dates import date_of, save_undated, with_date, without_date, writes_date
from halos.data.messages import SETTINGS
from halos.data.template import Template, template_of_run

from .tokenizers import CHATML, says, tokenizer, turn, user

DAY = date(2031, 5, 7)
LLAMA = (  # as Llama 3.1's
    "{%- if not date_string is defined %}{%- if strftime_now is defined %}{%- set date_string = strftime_now('%d %b %Y') %}"
    "{%- else %}{%- set date_string = '26 Jul 2024' %}{%- endif %}{%- endif %}{{ 'Today: ' + date_string + '\\n' }}"
)
GPT_OSS = "{%- macro system() -%}{{ 'Current date: ' + strftime_now('%Y-%m-%d') + '\\n' }}{%- endmacro -%}{{ system() }}"
WITHOUT_SYSTEM = "{%- if messages[0].role != 'system' %}{{ strftime_now('%B %d, %Y') + '\\n' }}{% endif %}"
WITH_TOOLS = "{%- if tools %}{% for tool in tools %}{{ strftime_now('%H:%M, 100%%') + '\\n' }}{% endfor %}{% endif %}"
IN_SEVERAL_TURNS = "{%- if messages|length > 2 %}{{ strftime_now('%Y-%m-%d') + '\\n' }}{% endif %}"
OF_A_ROW = "{%- if dated %}{{ strftime_now('%Y-%m-%d') + '\\n' }}{% endif %}"


def prompt(template: str, *turns: dict) -> str:
    return Template(tokenizer(template)).generation_prompt(turns or (user("Hi"),), "a.jsonl:7")


@pytest.mark.parametrize(
    ("head", "written"), [(LLAMA, "Today: 07 May 2031"), (GPT_OSS, "Current date: 2031-05-07"), (WITHOUT_SYSTEM, "May 07, 2031")]
)
def test_a_template_that_writes_the_date_writes_that_of_the_run(head: str, written: str) -> None:
    made = tokenizer(head + CHATML)
    dated = template_of_run(made, None, {}, "keep", DAY)
    assert prompt(dated) == f"{written}\n" + prompt(CHATML)
    assert without_date(dated) == head + CHATML
    assert template_of_run(tokenizer(dated), None, {}, "keep", DAY) == dated


def test_only_a_template_that_has_the_date_gets_one() -> None:
    assert template_of_run(tokenizer(), None, {}, "keep", DAY) == CHATML
    assert date_of(tokenizer(CHATML)) is None
    fixed = template_of_run(tokenizer(LLAMA + CHATML), None, {"date_string": "1 May"}, "keep", DAY)
    assert fixed.endswith(LLAMA + CHATML)
    assert not writes_date(tokenizer(fixed), fixed), "but it may, in a row with another date_string"
    for head in (LLAMA, GPT_OSS, WITHOUT_SYSTEM, WITH_TOOLS, IN_SEVERAL_TURNS):
        assert writes_date(tokenizer(head + CHATML), head + CHATML)
    assert not writes_date(tokenizer(OF_A_ROW + CHATML), OF_A_ROW + CHATML)


@pytest.mark.parametrize(
    ("head", "settings", "written"),
    [
        ("{{ strftime_now(fmt) }}", {"fmt": "%Y/%m/%d"}, "2031/05/07"),
        ("{% set f = '%' ~ 'Y' %}{{ strftime_now(f) }}", {}, "2031"),
        ("{% set now = strftime_now %}{{ now(format='%' + '-d') }}", {}, "7"),
    ],
    ids=["a setting's", "computed", "of another name"],
)
def test_the_date_of_a_format_that_does_not_stand_in_the_template(head: str, settings: dict, written: str) -> None:
    dated = template_of_run(tokenizer(head + CHATML), None, settings, "keep", DAY)
    assert prompt(dated) == written + prompt(CHATML)
    assert without_date(dated) == template_of_run(tokenizer(head + CHATML), None, settings, "keep")


def test_a_date_in_several_turns_or_by_a_setting_of_a_row_is_that_of_the_run() -> None:
    several = template_of_run(tokenizer(IN_SEVERAL_TURNS + CHATML), None, {}, "keep", DAY)
    assert prompt(several, user("a"), says("b"), user("c")).startswith("2031-05-07\n")
    dated = template_of_run(tokenizer(OF_A_ROW + CHATML), None, {}, "keep", DAY)
    assert prompt(dated, {**user("a"), SETTINGS: {"dated": True}}).startswith("2031-05-07\n")
    assert prompt(dated) == prompt(CHATML)


def test_every_directive_is_written_as_python_writes_it() -> None:
    for directive in (
        "%a %A %b %B %d %-d %j %m %y %Y %H:%M:%S %p", "%x %X", "%e. %h", "100%%", "%%d %%%d %", "%f %z %Z %c", "%E %q %n%t.",
        "%_d %^a %02d %Ey", "%C %D %F %G %g %I %k %l %P %r %R %T %u %U %V %w %W", "a\"b\\{%d}",
    ):  # fmt: skip
        moment = datetime(2031, 5, 7, 14, 3, 9)
        for template in (f"{{{{ strftime_now({directive!r}) }}}}", f"{{% set f = {directive!r} %}}{{{{ strftime_now(f) }}}}"):
            assert prompt(with_date(template + CHATML, moment)) == moment.strftime(directive) + prompt(CHATML)


def test_a_line_that_an_earlier_version_wrote_is_replaced() -> None:
    template = "{{ strftime_now('%Y') + '\\n' }}" + CHATML
    line = '{%- macro strftime_now(format, day="2030-01-02") %}{{ format|replace("\\u0025Y", "2030") }}{%- endmacro %}\n'
    assert prompt(line + template).startswith("2030\n")
    assert without_date(line + template) == template
    assert prompt(with_date(line + template, DAY)).startswith("2031\n")


def test_the_template_that_is_saved_writes_the_date_of_its_use(tmp_path: Path) -> None:
    made = tokenizer(LLAMA + CHATML)
    made.chat_template = template_of_run(made, None, {}, "keep", DAY)
    save_undated(made, tmp_path)
    assert date_of(made) == "2031-05-07"
    saved = AutoTokenizer.from_pretrained(tmp_path)
    assert saved.chat_template == LLAMA + CHATML
    assert saved.get_vocab() == made.get_vocab()


def test_a_date_with_a_system_turn_is_found() -> None:
    head = "{%- if messages[0].role == 'system' %}{{ strftime_now('%Y') + '\\n' }}{% endif %}"
    assert prompt(template_of_run(tokenizer(head + CHATML), None, {}, "keep", DAY), turn("system", "a"), user("b")).startswith(
        "2031\n"
    )
