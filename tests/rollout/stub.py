"""A local server that speaks the OpenAI API as badly as real ones do: it is slow, busy, broken and talks nonsense, by content.

python tests/rollout/stub.py PORT_FILE starts one by itself. What it does with a question is a function of the question, so that
every start of a run gets the same answers; the first attempts at some are turned away.
"""

import hashlib
import json
import os
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class Stub:
    """Counts what it was asked. `paid` has an entry for each answer that was given, by idempotency key."""

    def __init__(self, *, trouble: bool = True, slow: float = 0.0, fail: int = 0, usage: bool = True, quote: str = "no") -> None:
        self.trouble, self.slow, self.fail, self.usage = trouble, slow, fail, usage
        self.quote = quote  # what it says of a request that it refuses, and of one whose answer is nonsense
        self.seen: Counter[str] = Counter()  # requests by what they ask
        self.paid: Counter[str] = Counter()
        self.statuses: Counter[int] = Counter()
        self._lock = threading.Lock()
        stub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                status, text = stub.answer(self.path, body, self.headers.get("Idempotency-Key"))
                stub.statuses[status] += 1
                data = text.encode()
                try:
                    self.send_response(status)
                    self.send_header("Content-Type", "application/json")
                    self.send_header("Content-Length", str(len(data)))
                    if status == 429:
                        self.send_header("Retry-After", "0")
                    self.end_headers()
                    self.wfile.write(data)
                except OSError:
                    pass  # whoever asked is gone

            def log_message(self, *_: Any) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, path: str, body: dict[str, Any], key: str | None) -> tuple[int, str]:
        if self.fail:
            return self.fail, json.dumps({"error": {"message": self.quote}})
        text = body["messages"][-1]["content"]
        dice = int(hashlib.sha256(text.encode()).hexdigest(), 16)
        with self._lock:
            self.seen[text] += 1
            tries = self.seen[text]
        if self.trouble and dice % 10 == 0 and tries == 1:
            return 429, json.dumps({"error": {"message": "slow down"}})
        if self.trouble and dice % 10 == 1 and tries == 1:
            return 500, json.dumps({"error": {"message": "oops"}})
        time.sleep(self.slow * (1 + dice % 3))
        with self._lock:
            self.paid[key or text] += 1
        return 200, json.dumps(_chat(_said(dice, "[ANSWER B]" in text, self.trouble, self.quote), usage=self.usage))


def _said(dice: int, compare: bool, trouble: bool, quote: str) -> str:
    if trouble and dice % 10 == 2:
        return '{"score": '  # cut off
    if trouble and dice % 10 == 3:
        return f"What a lovely answer, ten out of ten! ({quote})"
    if compare:
        return json.dumps({"better": ("A", "B", "tie")[dice // 10 % 3]})
    return "```json\n" + json.dumps({"score": dice // 10 % 11}) + "\n```"


def _chat(text: str, *, usage: bool) -> dict[str, Any]:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    tokens = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110} if usage else None
    return {"id": "x", "object": "chat.completion", "created": 0, "model": "stub", "choices": [choice], "usage": tokens}


def main() -> None:
    """Serve until killed; what was paid is written to a file whenever it grows."""
    port, counts = Path(sys.argv[1]), Path(sys.argv[2])
    stub = Stub(slow=0.02)
    port.write_text(stub.url)
    last = -1
    while True:
        time.sleep(0.05)
        if (now := sum(stub.paid.values())) != last:
            last = now
            hidden = counts.with_suffix(".new")
            hidden.write_text(json.dumps({"paid": stub.paid, "statuses": stub.statuses}))
            os.replace(hidden, counts)


if __name__ == "__main__":
    main()
