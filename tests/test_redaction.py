"""A secret of the environment or in a URL is in no message, log, traceback or result; what is no secret stays."""

import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import pytest

from halos.errors import UserError, command, first_line_of
from halos.logs import PrintableFormatter
from halos.redaction import redact, secret_in_url, without_values
from halos.result_file import NAME, ResultFile
from halos.rollout.types import Score

SECRET = "sk-0123456789abcdefghij"


@pytest.fixture(autouse=True)
def secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_KEY", SECRET)


def test_a_command_and_its_log_have_the_name_of_a_variable_instead_of_its_value(capsys: pytest.CaptureFixture[str]) -> None:
    def fails() -> int:
        raise UserError(f"401: {SECRET} is no key")

    assert command(fails) == 2
    assert capsys.readouterr().err == "error: 401: <MY_API_KEY> is no key\n"


PROGRAM = """
import logging, os, threading
from halos.errors import command

def fails():
    raise ValueError(os.environ["MY_API_KEY"])

def main():
    logging.getLogger("library").warning(os.environ["MY_API_KEY"])
    thread = threading.Thread(target=fails)
    thread.start()
    thread.join()
    fails()

command(main)
"""


def test_an_error_that_nothing_catches_and_a_librarys_warning_are_written_without_secrets() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("<MY_API_KEY>\n")
    assert done.stderr.count("ValueError: <MY_API_KEY>") == 2
    assert SECRET not in done.stderr


def test_a_log_file_hides_secrets_in_messages_and_tracebacks() -> None:
    try:
        raise ValueError(f"Illegal header value b'Bearer {SECRET}'")
    except ValueError:
        record = logging.LogRecord("halos", logging.ERROR, "x", 1, "%s is no key", (SECRET,), sys.exc_info())
    line = PrintableFormatter("%(message)s").format(record)
    assert SECRET not in line
    assert line.count("<MY_API_KEY>") == 2


def test_the_reason_in_a_result_and_the_problem_of_a_score_hide_secrets(tmp_path: Path) -> None:
    file = ResultFile(tmp_path)
    file.write("failed", 3, {}, reason=f"401: {SECRET} is no key")
    assert "401: <MY_API_KEY> is no key" in (tmp_path / NAME).read_text()
    assert file.is_intact()
    assert Score(None, f"brief raised ValueError: {SECRET}").to_row()["problem"] == "brief raised ValueError: <MY_API_KEY>"


def test_a_secret_is_hidden_before_a_long_message_is_cut() -> None:
    assert SECRET[:5] not in first_line_of(ValueError("x" * 390 + SECRET))


@pytest.mark.parametrize(
    "spell", [str, json.dumps, repr, ascii, str.strip, quote], ids=["str", "json", "repr", "ascii", "strip", "quote"]
)
def test_a_secret_is_recognised_however_it_is_quoted(spell: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> None:
    secret = 'pä"ss\nword-17\n'
    monkeypatch.setenv("MY_PASSWORD", secret)
    assert "word-17" not in redact(f"it said {spell(secret)}")


def test_the_password_of_a_proxy_in_the_environment_is_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://alice:hunter2pass@proxy:3128")
    assert (
        redact("407: hunter2pass at http://alice:hunter2pass@proxy:3128") == "407: <HTTPS_PROXY> at http://<password>@proxy:3128"
    )


SECRET_URLS = [
    "http://alice:hunter2pass@host/v1", "https://ghp_abc@github.com/a/b", "http://alice:p@ss@host", "s3://id:hunter2pass@bucket/a",
    "git+https://abc@host/a", "https://host/a?x=1&api_key=abc", "https://host/a?key=abc", "https://host/a?token=abc#x",
    "https://host/a#access_token=abc", "https://host/a?X-Amz-Date=1&X-Amz-Signature=abc&X-Amz-Security-Token=abc",
    "https://blob/a?sv=1&sig=abc", "https://host?password=abc", "https://host?apiKey=abc",
    "https://host/a?hf_token=abc", "https://host/a?x=1&sessionToken=abc", "https://host/a?account_key=abc", "https://host?pwd=abc",
    "[http://a,http://b:abc@c]",
]  # fmt: skip
OTHER_URLS = [
    "http://localhost:8000/v1", "https://host/v1?version=2&max_tokens=5", "hf://datasets/org/name@main/a.jsonl", "hf://name@main",
    "s3://bucket/a.jsonl", "ssh://git@host/a", "git@github.com:a/b", "org/name", "https://host/v1/@alice", "https://host?key=",
    "https://host/a?monkey=1", "a?key=b", "https://host/a?page_token=2&sort_key=name",
]  # fmt: skip


@pytest.mark.parametrize("url", SECRET_URLS)
def test_a_secret_in_a_url_is_recognised_and_hidden(url: str) -> None:
    assert secret_in_url(f"of {url}")
    hidden = redact(f"{url} does not answer")
    assert not any(word in hidden for word in ("hunter2pass", "ghp_", "p@ss", "abc"))
    assert hidden.endswith(" does not answer")
    assert "host" in hidden or "host" not in url


@pytest.mark.parametrize("url", OTHER_URLS)
def test_other_urls_stay(url: str) -> None:
    assert secret_in_url(url) is None
    assert redact(url) == url


def test_only_long_secrets_are_replaced_in_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SORT_KEY", "distance")
    assert without_values(f"the distance of {SECRET} at http://a:b@c") == "the distance of <MY_API_KEY> at http://a:b@c"
