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
from functools import lru_cache
from typing import Final, NamedTuple

from gateway.predictor.shell_words import (
    AGENTS,
    HAS_SUBCOMMAND,
    HEAVY,
    HEAVY_PROGRAMS,
    INTERPRETERS,
    KEYWORDS,
    KNOWN,
    KNOWN_WITH_DIGITS,
    LOOPS,
    NOUNS,
    OPEN,
    OPTION_VALUES,
    PLAIN,
    RUN_SCRIPTS,
    RUNNERS,
    SCRIPTS,
    SHELLS,
    SUBCOMMANDS,
    TRIVIAL,
    WRAPPER_VALUES,
    WRAPPERS,
)

LOOK_CHARS: Final = 400
"""Characters of a command that are looked at."""
MAX_COMMANDS: Final = 8
MAX_SLEEP_S: Final = 86_400.0
UNKNOWN: Final = "*"

_TOKEN: Final = re.compile(
    r"[ \t]*+(?:((?:[^\s'\"\\;|&<>()`$#]++|\\.|'[^']*+'?|\"(?:[^\"\\]++|\\.)*+\"?|\$(?![({])"
    r"|\$\{[^}]*+\}?|(?<=\S)#)++)"  # a word
    r"|(\|\|?|&&|;;?|\n|&(?![>\d])|\$\(|`|[()])"  # an operator
    r"|([<>&]+\d?)"  # a redirection
    r"|\#[^\n]*+)",
    re.DOTALL,
)
_HERE: Final = re.compile(
    r"(?<!<)<<(?!<)(-?)[ \t]*((?:'[^'\n]*'|\"[^\"\n]*\"|\\.|[^\s'\"\\;&|<>()])++)"
)
_QUOTING: Final = re.compile(r"['\"\\]")
_PROGRAMS: Final = KNOWN | AGENTS | {"", "script", UNKNOWN}
_SUBS: Final = (
    SUBCOMMANDS
    | {word for sub in SUBCOMMANDS for word in sub.split(":")}
    | {"", "inline", "script"}
)
_KEY: Final = re.compile(r"(?:sk|pk|rk|glpat|xox[a-z]|hvs|shpat|dop|whsec)[-.:]").match
"""How keys of well-known services begin, beside those that digits or case give away."""
_WORD: Final = re.compile(r"[a-z][a-z0-9._+:-]{0,23}\Z")
_DIGIT: Final = re.compile(r"\d").search
_JOINT: Final = re.compile(r"[-_.:]").search
_ASSIGNMENT: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\+?=")
_DURATION: Final = re.compile(r"(\d+(?:\.\d*)?|\.\d+)([smhd]?)\Z")
_SECONDS: Final = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


class ShellCommand(NamedTuple):
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
        or (word.isdigit() or (_DIGIT(word) is not None and word not in KNOWN_WITH_DIGITS))
        or (len(word) > 16 and not _JOINT(word))
        or _KEY(word) is not None
    ):
        return UNKNOWN
    return word


@lru_cache(maxsize=4096)
def well_known(program: str, sub: str) -> tuple[str, str]:
    """What of a call may be written where others may read it: a program, or a sub-agent's type, and
    a subcommand if they are well-known ones. Any other word may be one of a file or an argument."""
    if program not in _PROGRAMS:
        return UNKNOWN, ""
    return program, sub if all(word in _SUBS for word in sub.split(":")) else UNKNOWN


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
    array = 0  # parentheses within the value of an array
    cases = 0
    pattern = False  # of a case
    for word, op, redirect in _TOKEN.findall(text):
        if array:
            array += (op in ("(", "$(")) - (op == ")")
        elif pattern:
            pattern = op != ")" and word != "esac"
            cases -= word == "esac"
        elif word:
            if skip_next:
                skip_next = False
            elif word == "in" and words[:1] == ["case"]:
                words.clear()
                cases, pattern = cases + 1, True
            elif word == "esac" and cases:
                cases -= 1
            else:
                words.append(word)
        elif op:
            skip_next = False
            if op == "(" and words and _ASSIGNMENT.fullmatch(words[-1]):
                array = 1
                continue
            pattern = op == ";;" and cases > 0
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
        if words[0] in LOOPS:
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
    """Whether here-documents are in the text, and the text without what is in them. One whose end
    is not there goes on to the end of the text."""
    found = False
    while (mark := _HERE.search(text)) is not None:
        found = True
        line, _, body = text[mark.end() :].partition("\n")
        indent, end = (r"\t*" if mark[1] else ""), re.escape(_QUOTING.sub("", mark[2]))
        close = re.search(rf"^{indent}{end}$", body, re.MULTILINE)
        after = "" if close is None else body[close.end() :]
        text = f"{text[: mark.start()]} {line}{after}"
    return found, text


def _command(
    words: list[str], depth: int
) -> tuple[str, str, int, float, float, ShellCommand | None] | None:
    """One simple command: program, subcommand, weight (-1: none to speak of), seconds slept,
    time limit, what a nested shell runs."""
    if words[0] in PLAIN:
        return words[0], "", 0, 0.0, 0.0, None
    i = 0
    n = len(words)
    limit = 0.0
    via = ""
    doubtful = False  # the next word may be the value of an option that is not known
    while i < n:
        word = words[i]
        if word in KEYWORDS or ("=" in word and _ASSIGNMENT.match(word)):
            i += 1
            continue
        name = _base(word)
        own = WRAPPERS.get(name)
        if own is not None:
            i += 1
            while i < n and words[i][:1] == "-":
                doubtful = doubtful or len(words[i]) > 2
                i += 2 if words[i] in WRAPPER_VALUES else 1
            if own and i < n:
                limit = max(limit, _duration(words[i]))
                i += own
            if i >= n:
                return name, "", 0, 0.0, limit, None
            continue
        runs = RUNNERS.get(name)
        if runs:
            if "" in runs:
                i += 1
            else:
                j = _skip_options(words, i + 1)
                if j >= n or words[j] not in runs:
                    break
                i = j + 1
            after = _skip_options(words, i)
            doubtful = doubtful or after > i
            i = after
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
    if name in SHELLS and depth < 2:
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
    program = name if name in KNOWN else safe_word(name)
    if program not in KNOWN:
        if "/" in word or "\\" in word or program.endswith(SCRIPTS):
            program = "script"
        elif doubtful:
            program = UNKNOWN
    sub = ""
    if name in INTERPRETERS and name != "bun":
        sub = _interpreted(rest)
        if sub and sub[0] == ":":
            program, sub = sub[1:], ""
    elif program in HAS_SUBCOMMAND:
        sub = _subcommand(program, rest)
    weight = 0 if name in TRIVIAL else 1
    if weight and (program in HEAVY_PROGRAMS or via):
        weight = 2
    if sub and (sub in HEAVY or sub.partition(":")[0] in HEAVY or sub.startswith("test")):
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
        if words[i] in OPTION_VALUES and i + 1 < len(words):
            i += 1
        i += 1
    return i


def _subcommand(program: str, rest: list[str]) -> str:
    """A program's subcommand. Of programs with subcommands of their own only known ones are kept;
    behind an option whose value may be the next word, of all programs."""
    i = _skip_options(rest, 0)
    while i < len(rest) and _ASSIGNMENT.match(rest[i]):
        i += 1
    if i >= len(rest):
        return ""
    word = rest[i]
    if word == "run" and program in RUN_SCRIPTS:
        j = _skip_options(rest, i + 1)
        if j >= len(rest):
            return "run"
        return _script(rest[j], doubtful=j > i + 1)
    if program in OPEN:
        return _script(word, doubtful=i > 0)
    if word not in SUBCOMMANDS:
        return UNKNOWN
    if word in NOUNS:
        j = _skip_options(rest, i + 1)
        if j < len(rest) and rest[j] in SUBCOMMANDS:
            return f"{word}:{rest[j]}"
    return word


def _script(word: str, doubtful: bool) -> str:
    """A script's or target's name, which may be anything."""
    if word in SUBCOMMANDS:
        return word
    return UNKNOWN if doubtful else safe_word(word)


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
