"""Fetch parts of a vLLM release's source distribution from PyPI, checked by its digest.

`python -m engine_patch.vllm_source 0.33.0 DIRECTORY vllm/v1/` unpacks that folder; nothing is
built or imported.
"""

import hashlib
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
from pathlib import Path


def fetch(version: str, directory: Path, *parts: str) -> Path:
    """Unpack what begins with one of `parts` of `vllm==version` into `directory`; return its root.

    A root that is there already is returned as it is.

    Raises:
        LookupError: PyPI has no such source distribution.
        ValueError: the download's SHA-256 is not PyPI's.
    """
    root = directory / f"vllm-{version}"
    if root.is_dir():
        return root
    index = os.environ.get("PIP_INDEX_URL") or _pips_index()
    request = urllib.request.Request(  # noqa: S310
        f"{index.rstrip('/')}/vllm/", headers={"Accept": "application/vnd.pypi.simple.v1+json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310
        files = json.load(answer)["files"]
    name = f"vllm-{version}.tar.gz"
    found = next((f for f in files if f["filename"] == name), None)
    if found is None:
        raise LookupError(f"PyPI has no {name}")
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory) as unfinished:
        archive = Path(unfinished) / name
        digest = hashlib.sha256()
        with urllib.request.urlopen(found["url"], timeout=300) as source, archive.open("wb") as out:  # noqa: S310
            while chunk := source.read(1 << 20):
                digest.update(chunk)
                out.write(chunk)
        if digest.hexdigest() != found["hashes"]["sha256"]:
            raise ValueError(f"{name}: SHA-256 differs from PyPI's")
        with tarfile.open(archive) as tar:
            members = [m for m in tar if m.name.partition("/")[2].startswith(parts)]
            tar.extractall(unfinished, members, filter="data")
        (Path(unfinished) / root.name).rename(root)  # all of it or none
    return root


def _pips_index() -> str:
    """Where pip looks by default. Asked in a process of its own: pip changes what it imports."""
    code = "from pip._internal.models.index import PyPI; print(PyPI.simple_url)"
    asked = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)  # noqa: S603
    return asked.stdout.strip()


if __name__ == "__main__":
    print(fetch(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:]))
