"""What a shell command runs: the programs and subcommands that its time depends on.

Not a shell parser: one regular expression cuts the first `LOOK_CHARS` into words and operators, and
a walk over them finds each command's program behind assignments, wrappers and options. Linear in
what is looked at; never raises.

What comes out is safe to keep: a program or subcommand is a short lower-case word; anything else (a
path's directories, an assignment, a flag's value, a URL, a long or random-looking word) is dropped
or replaced by ``*``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

LOOK_CHARS: Final = 600
"""Characters of a command that are looked at."""
MAX_COMMANDS: Final = 8
MAX_SLEEP_S: Final = 86_400.0
UNKNOWN: Final = "*"

_TOKEN: Final = re.compile(
    r"((?:[^\s'\"\\;|&<>()`$#]++|\\.|'[^']*+'?|\"(?:[^\"\\]|\\.)*+\"?|\$(?![({])|\$\{[^}]*+\}?"
    r"|(?<=\S)#)++)"  # a word
    r"|(\|\|?|&&|;;?|\n|&(?![>\d])|\$\(|`|[()])"  # an operator
    r"|([<>&]+\d?)"  # a redirection
    r"|\#[^\n]*+",
    re.DOTALL,
)
_HERE: Final = re.compile(r"<<-?\s*['\"]?(\w+)")
_WORD: Final = re.compile(r"[a-z][a-z0-9._+:-]{0,23}\Z")
_DIGIT: Final = re.compile(r"\d").search
_JOINT: Final = re.compile(r"[-_.:]").search
_ASSIGNMENT: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\+?=")
_KNOWN_WITH_DIGITS: Final = frozenset(
    [
        "python2",
        "python3",
        "pip3",
        "base64",
        "md5sum",
        "sha1sum",
        "sha256sum",
        "sqlite3",
        "k9s",
        "k3s",
        "k3d",
        "s3",
        "s3api",
        "ec2",
        "gpg2",
        "7z",
        "bzip2",
        "x264",
        "node18",
        "node20",
        "node22",
        "e2e",
        "test:e2e",
        "go1",
        "g++",
        "i18n",
        "git2",
        "aws2",
        "route53",
        "iconv2",
        "openssl3",
        "test:e2e:ci",
        "build:e2e",
        "e2e:ci",
        "markdownlint-cli2",
        "nvidia-smi2",
        "l10n",
        "m4",
        "v8",
        "f2py",
        "h5dump",
        "wasm32",
        "rsync3",
        "lua5.1",
        "py3",
        "ipython3",
        "nosetests3",
        "pytest3",
        "jq2",
        "s3cmd",
        "s5cmd",
        "ps2pdf",
        "pdf2svg",
        "c++",
        "mp3",
        "k6",
    ]
)
_DURATION: Final = re.compile(r"(\d+(?:\.\d*)?|\.\d+)([smhd]?)\Z")
_SECONDS: Final = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}

_TRIVIAL: Final = frozenset(
    [
        "cd",
        "echo",
        "export",
        "set",
        "unset",
        "source",
        ".",
        "pwd",
        "true",
        "false",
        ":",
        "test",
        "[",
        "[[",
        "printf",
        "head",
        "tail",
        "cat",
        "wc",
        "sort",
        "uniq",
        "cut",
        "tr",
        "tee",
        "exit",
        "return",
        "read",
        "local",
        "declare",
        "shift",
        "pushd",
        "popd",
        "alias",
        "eval",
        "trap",
        "umask",
        "ulimit",
        "jq",
        "then",
        "else",
        "do",
        "done",
        "fi",
        "esac",
        "if",
        "for",
        "while",
        "until",
        "case",
        "in",
        "select",
        "function",
        "{",
        "}",
        "!",
        "grep",
        "sed",
        "awk",
        "ls",
        "mkdir",
        "touch",
        "rm",
        "cp",
        "mv",
        "basename",
        "dirname",
        "date",
        "whoami",
        "which",
        "type",
        "command",
        "dig",
        "chmod",
        "column",
    ]
)
"""Commands that take no time to speak of beside others in the same line."""
_KEYWORDS: Final = frozenset(
    ["then", "else", "elif", "do", "if", "while", "until", "!", "{", "}", "time"]
)
_LOOPS: Final = frozenset(("for", "while", "until"))
_WRAPPERS: Final = {
    # a wrapper: how many words of its own follow its options
    "sudo": 0, "doas": 0, "env": 0, "nohup": 0, "nice": 0, "ionice": 0, "time": 0, "command": 0,
    "exec": 0, "builtin": 0, "stdbuf": 0, "setsid": 0, "caffeinate": 0, "xargs": 0, "watch": 0,
    "unbuffer": 0, "chronic": 0, "timeout": 1, "gtimeout": 1, "flock": 1, "rtk": 0, "winpty": 0,
}  # fmt: skip
_WRAPPER_VALUES: Final = frozenset(
    [
        "-u",
        "-n",
        "-k",
        "-s",
        "-c",
        "-C",
        "-i",
        "-o",
        "-e",
        "-I",
        "-P",
        "-L",
        "-d",
        "-g",
        "--signal",
        "--kill-after",
        "--adjustment",
        "--user",
    ]
)
"""Options of wrappers whose value is the next word."""
_RUNNERS: Final = {
    # a runner: its subcommands that run what follows ("" = it does so at once)
    "uv": ("run",), "poetry": ("run",), "pdm": ("run",), "hatch": ("run",), "pipenv": ("run",),
    "rye": ("run",), "conda": ("run",), "mise": ("exec", "x"), "devbox": ("run",),
    "npx": ("",), "bunx": ("",), "uvx": ("",), "pipx": ("run",), "dotenv": ("",), "op": ("run",),
    "bundle": ("exec",), "pnpm": ("exec", "dlx"), "yarn": ("exec", "dlx"), "npm": ("exec",),
    "bun": ("x",), "docker": (), "direnv": ("exec",),
}  # fmt: skip
_SHELLS: Final = frozenset(["bash", "sh", "zsh", "dash", "fish", "ksh"])
_INTERPRETERS: Final = frozenset(
    [
        "python",
        "python3",
        "node",
        "ruby",
        "perl",
        "php",
        "deno",
        "bun",
        "tsx",
        "ts-node",
        "java",
        "osascript",
    ]
)
_HAS_SUBCOMMAND: Final = frozenset(
    [
        "git",
        "gh",
        "glab",
        "go",
        "cargo",
        "npm",
        "pnpm",
        "yarn",
        "bun",
        "deno",
        "uv",
        "pip",
        "pip3",
        "poetry",
        "pdm",
        "hatch",
        "docker",
        "podman",
        "docker-compose",
        "kubectl",
        "helm",
        "terraform",
        "tofu",
        "aws",
        "gcloud",
        "az",
        "make",
        "just",
        "task",
        "mise",
        "rake",
        "bundle",
        "dotnet",
        "gradle",
        "gradlew",
        "./gradlew",
        "mvn",
        "mvnw",
        "brew",
        "apt",
        "apt-get",
        "dnf",
        "systemctl",
        "nx",
        "turbo",
        "lerna",
        "vercel",
        "wrangler",
        "flyctl",
        "fly",
        "heroku",
        "supabase",
        "firebase",
        "prisma",
        "alembic",
        "django-admin",
        "flutter",
        "dart",
        "swift",
        "xcodebuild",
        "mix",
        "rustup",
        "golangci-lint",
        "ruff",
        "pre-commit",
        "conda",
        "bazel",
        "buck2",
        "cmake",
        "ninja",
        "svn",
        "hg",
        "jj",
        "bd",
        "entire",
        "agentv",
        "workmux",
        "codex",
        "claude",
        "gemini",
        "opencode",
        "tmux",
        "vault",
        "nomad",
        "consul",
        "composer",
        "artisan",
        "sbt",
        "lein",
        "stack",
        "cabal",
        "opam",
        "nix",
        "pytest-xdist",
        "bd",
        "linear",
    ]
)
"""Programs whose first plain word is a command of its own."""
_HEAVY: Final = frozenset(
    [
        "test",
        "tests",
        "check",
        "build",
        "install",
        "ci",
        "lint",
        "clippy",
        "fmt",
        "push",
        "pull",
        "clone",
        "fetch",
        "publish",
        "deploy",
        "e2e",
        "typecheck",
        "bench",
        "run",
        "up",
        "verify",
        "validate",
        "compile",
        "watch",
        "view",
        "create",
        "wait",
        "apply",
        "plan",
    ]
)
"""Subcommands that outlast what stands beside them."""
_HEAVY_PROGRAMS: Final = frozenset(
    [
        "pytest",
        "vitest",
        "jest",
        "mocha",
        "playwright",
        "cypress",
        "tsc",
        "eslint",
        "mypy",
        "golangci-lint",
        "webpack",
        "vite",
        "rollup",
        "gradle",
        "gradlew",
        "mvn",
        "make",
        "cmake",
        "ninja",
        "xcodebuild",
        "cargo",
        "docker",
        "tox",
        "nox",
        "sleep",
        "wait",
        "curl",
        "wget",
        "ssh",
        "rsync",
        "scp",
        "terraform",
        "helm",
        "kubectl",
        "ansible-playbook",
        "ffmpeg",
        "claude",
        "codex",
    ]
)
_SCRIPTED: Final = frozenset(("npm", "pnpm", "yarn", "bun"))


@dataclass(slots=True, frozen=True)
class ShellCommand:
    """What a command line runs. ``program`` and ``sub`` are of the command that its time most
    likely depends on; ``sub`` is empty where there is none."""

    program: str
    sub: str
    second: str
    """The program of the next weightiest command, or empty."""
    commands: int
    pipes: int
    sleep_s: float
    """Seconds of all `sleep N` together."""
    timeout_s: float
    """Of a `timeout N` before the command; 0 if there is none."""
    loops: bool
    here_doc: bool
    detached: bool
    """A command is left running behind the line (``&``)."""


EMPTY: Final = ShellCommand(UNKNOWN, "", "", 0, 0, 0.0, 0.0, False, False, False)


@lru_cache(maxsize=4096)
def safe_word(word: str) -> str:
    """``word`` in lower case if it may be kept, else ``*``. Kept are short plain words; one with
    digits is kept only if it is a known program's name, as passwords and keys have digits too."""
    word = word.lower()
    if (
        not _WORD.match(word)
        or (word.isdigit() or (_DIGIT(word) is not None and word not in _KNOWN_WITH_DIGITS))
        or (len(word) > 16 and not _JOINT(word))
    ):
        return UNKNOWN
    return word


def parse_shell(command: str) -> ShellCommand:
    """The programs of a command line (bash, PowerShell by and large)."""
    return _parse(command[:LOOK_CHARS], 0)


def _parse(text: str, depth: int) -> ShellCommand:
    loops = here_doc = detached = False
    if "\\\n" in text:
        text = text.replace("\\\n", " ")
    if "<<" in text:
        here_doc, text = _without_here_docs(text)
    words: list[str] = []
    simple = [words]
    pipes = 0
    skip_next = False
    for word, op, redirect in _TOKEN.findall(text):
        if word:
            if skip_next:
                skip_next = False
            else:
                words.append(word)
        elif op:
            skip_next = False
            if op == "|":
                pipes += 1
            elif op == "&":
                detached = True
            if words:
                if len(simple) >= MAX_COMMANDS:
                    break
                words = []
                simple.append(words)
        elif redirect:
            skip_next = redirect[-1] in "<>&"
            if words and words[-1].isdigit():
                words.pop()
    best: tuple[int, str, str] | None = None
    second = ""
    second_weight = -1
    count = 0
    sleep_s = timeout_s = 0.0
    for words in simple:
        if not words:
            continue
        if words[0] in _LOOPS:
            loops = True
        found = _command(words, depth)
        if found is None:
            continue
        program, sub, weight, sleeps, limit, inner = found
        sleep_s += sleeps
        timeout_s = max(timeout_s, limit)
        if inner is not None:
            pipes += inner.pipes
            loops |= inner.loops
            here_doc |= inner.here_doc
            sleep_s += inner.sleep_s
        if weight < 0:
            continue
        count += 1
        if best is None or weight > best[0]:
            if best is not None:
                second, second_weight = best[1], best[0]
            best = weight, program, sub
        elif weight > second_weight:
            second, second_weight = program, weight
    if best is None:
        return EMPTY
    return ShellCommand(
        best[1],
        best[2],
        second,
        count,
        pipes,
        min(sleep_s, MAX_SLEEP_S),
        min(timeout_s, MAX_SLEEP_S),
        loops,
        here_doc,
        detached,
    )


def _without_here_docs(text: str) -> tuple[bool, str]:
    """Whether here-documents are in the text, and the text without what is in them."""
    found = False
    for _ in range(4):
        mark = _HERE.search(text)
        if mark is None:
            break
        found = True
        body = text.find("\n", mark.end())
        close = text.find("\n" + mark[1], body) if body >= 0 else -1
        if close >= 0:
            after = close + 1 + len(mark[1])
            text = f"{text[: mark.start()]} {text[mark.end() : body]}{text[after:]}"
        else:
            text = text[: mark.start()] + (text[mark.end() : body] if body >= 0 else "")
    return found, text


def _command(
    words: list[str], depth: int
) -> tuple[str, str, int, float, float, ShellCommand | None] | None:
    """One simple command: program, subcommand, weight (-1: none to speak of), seconds slept,
    time limit, what a nested shell runs."""
    i = 0
    n = len(words)
    limit = 0.0
    via = ""
    while i < n:
        word = words[i]
        if word in _KEYWORDS or _ASSIGNMENT.match(word):
            i += 1
            continue
        name = _base(word)
        own = _WRAPPERS.get(name)
        if own is not None:
            i += 1
            while i < n and words[i][:1] == "-":
                i += 2 if words[i] in _WRAPPER_VALUES else 1
            if own and i < n:
                limit = max(limit, _duration(words[i]))
                i += own
            if i >= n:
                return name, "", 0, 0.0, limit, None
            continue
        runs = _RUNNERS.get(name)
        if runs:
            if "" in runs:
                i += 1
            else:
                j = _skip_options(words, i + 1)
                if j >= n or words[j] not in runs:
                    break
                i = j + 1
            i = _skip_options(words, i)
            via = name
            if i >= n:
                return name, "run", 2, 0.0, limit, None
            continue
        break
    if i >= n:
        return None
    word = words[i]
    name = _base(word)
    rest = words[i + 1 :]
    if name in _SHELLS and depth < 2:
        for j, option in enumerate(rest):
            if option[:1] == "-" and "c" in option and j + 1 < len(rest):
                inner = _parse(_unquoted(rest[j + 1]), depth + 1)
                if inner.commands:
                    return inner.program, inner.sub, 1, 0.0, max(limit, inner.timeout_s), inner
                break
            if option[:1] != "-":
                return name, "script", 2, 0.0, limit, None
        return name, "", 1, 0.0, limit, None
    if name == "sleep":
        slept = sum(_duration(each) for each in rest[:4])
        return name, "", 1, slept, limit, None
    program = safe_word(name)
    if "/" in word and program == UNKNOWN:
        program = "script"
    sub = ""
    if name in _INTERPRETERS and name != "bun":
        sub = _interpreted(rest)
        if sub and sub[0] == ":":
            program, sub = sub[1:], ""
    elif program in _HAS_SUBCOMMAND:
        sub = _subcommand(program, rest)
    elif program.endswith((".sh", ".py", ".js", ".ts")):
        program, sub = "script", program[-2:]
    weight = 0 if name in _TRIVIAL else 1
    if weight and (program in _HEAVY_PROGRAMS or via):
        weight = 2
    if sub in _HEAVY or sub.partition(":")[0] in _HEAVY or sub.startswith("test"):
        weight = 3
    return program, sub, weight, 0.0, limit, None


def _base(word: str) -> str:
    """A program's own name, of a path to it."""
    if word[:1] in "'\"":
        word = _unquoted(word)
    if "/" in word or "\\" in word:
        word = word.replace("\\", "/").rpartition("/")[2]
    at = word.find("@", 1)
    if at > 0:
        word = word[:at]
    return word.removesuffix(".exe")


def _unquoted(word: str) -> str:
    quote = word[:1]
    if quote and quote in "'\"":
        word = word[1:]
        if word.endswith(quote):
            word = word[:-1]
        if quote == '"':
            word = word.replace('\\"', '"')
    return word


def _skip_options(words: list[str], i: int) -> int:
    while i < len(words) and words[i][:1] == "-":
        if words[i] in _OPTION_VALUES and i + 1 < len(words):
            i += 1
        i += 1
    return i


_OPTION_VALUES: Final = frozenset(
    [
        "-C",
        "-c",
        "-f",
        "-n",
        "-p",
        "--prefix",
        "--project",
        "--filter",
        "--with",
        "--directory",
        "--cwd",
        "--package",
        "--file",
        "--namespace",
        "--context",
        "--repo",
        "-R",
        "--manifest-path",
        "--python",
        "--profile",
        "--region",
        "--config",
    ]
)
"""Options before a subcommand whose value is the next word."""


def _subcommand(program: str, rest: list[str]) -> str:
    i = _skip_options(rest, 0)
    if i >= len(rest):
        return ""
    sub = safe_word(rest[i])
    if sub == "run" and program in {*_SCRIPTED, "mise", "deno"}:
        i = _skip_options(rest, i + 1)
        return safe_word(rest[i]) if i < len(rest) else "run"
    if program in {"gh", "docker", "kubectl", "aws", "gcloud", "az"} and i + 1 < len(rest):
        j = _skip_options(rest, i + 1)
        if j < len(rest) and sub in {
            "pr",
            "issue",
            "run",
            "repo",
            "release",
            "compose",
            "workflow",
        }:
            verb = safe_word(rest[j])
            if verb != UNKNOWN:
                return f"{sub}:{verb}"
    return sub


def _interpreted(rest: list[str]) -> str:
    """What an interpreter runs: ``:module``, ``inline``, ``script`` or nothing."""
    for j, option in enumerate(rest):
        if option == "-m" and j + 1 < len(rest):
            return ":" + safe_word(rest[j + 1])
        if option in ("-c", "-e", "-p", "--eval", "-"):
            return "inline"
        if option[:1] != "-":
            return "script"
    return ""


def _duration(word: str) -> float:
    found = _DURATION.match(word[:16])
    if found is None:
        return 0.0
    return min(float(found[1]) * _SECONDS[found[2]], MAX_SLEEP_S)
