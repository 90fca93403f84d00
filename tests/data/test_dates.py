from datetime import date, datetime
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from halos.data.dates import date_of, save_undated, with_date, without_date, writes_date
from halos.data.template import Template, template_of_run

from .tokenizers import CHATML, tokenizer, turn, user

DAY = date(2031, 5, 7)
LLAMA = (  # as Llama 3.1's
    "{%- if not date_string is defined %}{%- if strftime_now is defined %}{%- set date_string = strftime_now('%d %b %Y') %}"
    "{%- else %}{%- set date_string = '26 Jul 2024' %}{%- endif %}{%- endif %}{{ 'Today: ' + date_string + '\\n' }}"
)
GPT_OSS = "{%- macro system() -%}{{ 'Current date: ' + strftime_now('%Y-%m-%d') + '\\n' }}{%- endmacro -%}{{ system() }}"
WITHOUT_SYSTEM = "{%- if messages[0].role != 'system' %}{{ strftime_now('%B %d, %Y') + '\\n' }}{% endif %}"
WITH_TOOLS = "{%- if tools %}{% for tool in tools %}{{ strftime_now('%H:%M, 100%%') + '\\n' }}{% endfor %}{% endif %}"


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


def test_only_a_template_that_writes_a_date_in_some_conversation_gets_one() -> None:
    fixed = {"date_string": "1 May"}
    assert template_of_run(tokenizer(LLAMA + CHATML), None, fixed, "keep", DAY).endswith(LLAMA + CHATML)
    for template, kept in ((CHATML, {}), (LLAMA + CHATML, fixed), ("{# strftime_now #}" + CHATML, {})):
        assert date_of(tokenizer(template_of_run(tokenizer(template), None, kept, "keep", DAY))) is None
    for head in (LLAMA, GPT_OSS, WITHOUT_SYSTEM, WITH_TOOLS):
        assert writes_date(tokenizer(head + CHATML), head + CHATML)


def test_every_directive_is_written_as_python_writes_it() -> None:
    for directive in ("%a %A %b %B %d %-d %j %m %y %Y %H:%M:%S %p", "%x %X", "%e. %h", "100%%"):
        template, moment = f"{{{{ strftime_now({directive!r}) }}}}" + CHATML, datetime(2031, 5, 7, 14, 3, 9)
        assert prompt(with_date(template, moment)) == moment.strftime(directive) + prompt(CHATML)


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
