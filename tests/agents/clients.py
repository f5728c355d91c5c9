"""The agents that the tests run: which versions, and where they are installed.

Each is installed on demand into `.cache/agents`, from npm or PyPI, as its users get it.
`python -m tests.agents.clients` installs them all.
"""

from __future__ import annotations

import fcntl
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

CACHE = Path(__file__).parents[2] / ".cache" / "agents"
INSTALL_TIMEOUT_S = 400


class UnavailableError(Exception):
    """The client cannot be had here; the text says why."""


@dataclass(frozen=True)
class Client:
    """A client by its package. ``binary`` is a glob of its program inside the folder it is
    installed in; of several, for other processors or C libraries, the first that runs is taken."""

    name: str
    packages: tuple[str, ...]
    binary: str

    def installed(self) -> Path:
        """The client's program, installed if it was not. Raises `UnavailableError`."""
        folder = CACHE / f"{self.name}-{self.packages[0].rpartition('=' if self.pip else '@')[2]}"
        done = folder / ".installed"
        CACHE.mkdir(parents=True, exist_ok=True)
        with (CACHE / f"{self.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # tests run in several processes
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                self._install(folder)
                done.touch()
        for program in sorted(folder.glob(self.binary)):
            if (
                subprocess.run([program, "--help"], capture_output=True, check=False).returncode
                == 0
            ):
                return program
        raise UnavailableError(f"{self.name}: no program of its package runs on this machine")

    @property
    def pip(self) -> bool:
        return "==" in self.packages[0]

    def _install(self, folder: Path) -> None:
        if self.pip:
            _run(self.name, sys.executable, "-m", "venv", str(folder))
            pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet"]
            _run(self.name, *pip, "--disable-pip-version-check", *self.packages)
            return
        npm = shutil.which("npm")
        if npm is None:
            raise UnavailableError(f"{self.name}: npm is not installed")
        # The programs are native binaries; what the packages' scripts would do is link them.
        quiet = ["--no-audit", "--no-fund", "--ignore-scripts", "--loglevel=error"]
        _run(self.name, npm, "install", "--prefix", str(folder), *quiet, *self.packages)


def _run(name: str, *command: str) -> None:
    try:
        subprocess.run(
            command, check=True, capture_output=True, text=True, timeout=INSTALL_TIMEOUT_S
        )
    except subprocess.CalledProcessError as error:
        raise UnavailableError(f"{name}: {error.stderr.strip()[-500:]}") from None
    except subprocess.TimeoutExpired:
        raise UnavailableError(f"{name}: not installed in {INSTALL_TIMEOUT_S} s") from None


CLAUDE_CODE = Client(
    "claude-code",
    ("@anthropic-ai/claude-code@2.1.330",),
    "node_modules/@anthropic-ai/claude-code-*/claude",
)
CODEX = Client(
    "codex",
    ("@openai/codex@0.169.0",),
    "node_modules/@openai/codex-*/vendor/*/bin/codex",
)
OPENCODE = Client(
    "opencode",
    ("opencode-ai@1.18.33",),
    "node_modules/opencode-*/bin/opencode",
)
MINI_SWE_AGENT = Client(
    "mini-swe-agent",
    ("mini-swe-agent==2.4.6", "litellm==1.106.2", "mcp==2.3.0"),
    "bin/mini",
)


if __name__ == "__main__":
    for client in (CLAUDE_CODE, CODEX, OPENCODE, MINI_SWE_AGENT):
        started_at = time.monotonic()
        print(f"{client.name}: {client.installed()} ({time.monotonic() - started_at:.0f} s)")
