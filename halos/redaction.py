"""Secrets of the environment and in URLs: recognised, and replaced by names in whatever is printed, logged or saved."""

import json
import logging
import os
import re
import sys
import threading
import traceback
from types import TracebackType
from urllib.parse import quote, unquote

SUFFIXES = ("KEY", "TOKEN", "SECRET", "PASSWORD", "PASSWD", "PASSPHRASE")
MIN_LENGTH = 8  # characters; anything shorter may well occur by chance
MIN_LENGTH_INSIDE = 20  # characters; a secret this long is also searched for inside longer text

# a quote or a backslash ends a URL, since it may be inside JSON
_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://[^\s'\"\\<>]+")
_USERINFO = re.compile(r"(?P<scheme>[a-zA-Z][a-zA-Z0-9+.-]*://)(?P<userinfo>[^\s/?#'\"\\<>]+)@")
# before the last word of a parameter's name; others, as of page_token or sort_key, name no secret
_WORDS = (
    r"(?:(?:x|api|access|auth|client|secret|security|amz|goog|subscription|private|hf|session|refresh|id|bearer|user|account|app"
    r"|bot|sas|github|gitlab|slack|aws|service)[_-]?)*"
)
_LAST = r"(?:key|token|secret|password|passwd|passphrase|pwd|jwt|bearer|sig|signature)"
_PARAMETER = re.compile(rf"(?P<before>[?&;#](?P<name>{_WORDS}{_LAST})=)[^&;#]+", re.IGNORECASE)


def redact(text: str) -> str:
    """Return `text` with the value of every secret environment variable replaced by its name, and without secrets in URLs."""
    text = _USERINFO.sub(lambda found: f"{found['scheme']}<password>@" if _is_secret(found) else found[0], text)
    text = _URL.sub(lambda url: _PARAMETER.sub(r"\g<before>...", url[0]), text)
    return without_values(text, MIN_LENGTH)


def without_values(text: str, shortest: int = MIN_LENGTH_INSIDE) -> str:
    """Return `text` with the values of secret environment variables replaced: for a server's answers, which are data, only long
    ones, which occur nowhere by chance."""
    for value, name in sorted(environment_secrets().items(), key=lambda known: -len(known[0])):
        if len(value) >= shortest:
            for spelled in _spellings(value):
                text = text.replace(spelled, f"<{name}>")
    return text


def environment_secrets() -> dict[str, str]:
    """The secrets in the environment, with the names of their variables: by a variable's name, or the password in its URL."""
    known = {}
    for name, value in os.environ.items():
        value = value.strip()
        if name.upper().endswith(SUFFIXES) and len(value) >= MIN_LENGTH:
            known[value] = name
        elif "://" in value and (found := _USERINFO.match(value)) and _is_secret(found):
            password = found["userinfo"].partition(":")[2] or found["userinfo"]
            known |= {each: name for each in (password, unquote(password)) if len(each) >= MIN_LENGTH}
    return known


def secret_in_url(text: str) -> str | None:
    """Say what is secret in the URLs of a text: a password, or a parameter that names a key; None for nothing."""
    if any(map(_is_secret, _USERINFO.finditer(text))):
        return "a user or password"
    found = next(filter(None, map(_PARAMETER.search, _URL.findall(text))), None)
    return f"a secret ({found['name']}=)" if found else None


class RedactingFormatter(logging.Formatter):
    """Hides secrets, which libraries' errors may quote, in messages and in tracebacks."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


def write_redacted_tracebacks() -> None:
    """Have errors that nothing catches, and warnings that libraries log, written without secrets: this process's stderr may go to
    a file."""
    sys.excepthook = write_traceback
    threading.excepthook = _write_traceback_of_thread
    if logging.lastResort is not None:  # of loggers that have no handler
        logging.lastResort.setFormatter(RedactingFormatter())


def write_traceback(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
    sys.stderr.write(redact("".join(traceback.format_exception(kind, error, trace))))


def _write_traceback_of_thread(each: threading.ExceptHookArgs) -> None:
    if each.exc_type is not SystemExit:
        sys.stderr.write(f"Exception in thread {each.thread.name if each.thread else '?'}:\n")
        write_traceback(each.exc_type, each.exc_value, each.exc_traceback)


def _is_secret(userinfo: re.Match[str]) -> bool:
    """Whether the userinfo of a URL is secret: a password, or over HTTP any, since a token may be given as the user."""
    return ":" in userinfo["userinfo"] or userinfo["scheme"].lower().endswith(("http://", "https://"))


def _spellings(value: str) -> list[str]:
    """A value as it is, in JSON, in a Python literal and in a URL, the longest first."""
    literals = (json.dumps(value, ensure_ascii=False), json.dumps(value), repr(value), ascii(value), repr(value.encode())[1:])
    return sorted({value, quote(value, safe=""), *(literal[1:-1] for literal in literals)}, key=len, reverse=True)
