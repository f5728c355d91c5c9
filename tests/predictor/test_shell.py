"""What is read out of shell commands."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.predictor.shell import UNKNOWN, parse_shell, safe_word, well_known
from tests.yardstick import cpu_s, plain_python_s


@pytest.mark.parametrize(
    ("command", "program", "sub"),
    [
        ("pytest -q tests", "pytest", ""),
        ("cd /src/app && pytest -q", "pytest", ""),
        ("cd app; go test ./... 2>&1 | tail -20", "go", "test"),
        ("CGO_ENABLED=0 GOOS=linux go build ./cmd/app", "go", "build"),
        ("env FOO=bar RUST_LOG=debug cargo test", "cargo", "test"),
        ("timeout 60 npm run test:unit -- --watch=false", "npm", "test:unit"),
        ("timeout -k 5 60s make lint", "make", "lint"),
        ("bash -lc 'cd x && go vet ./...'", "go", "vet"),
        ('bash -c "uv run pytest -x"', "pytest", ""),
        ("uv run --with rich pytest", "pytest", ""),
        ("uv run python -m pytest -q", "pytest", ""),
        ("npx --yes eslint@9.1.0 src", "eslint", ""),
        ("python -m mypy --strict", "mypy", ""),
        ("python3 -c 'import os; print(1)'", "python3", "inline"),
        ("python scripts/run.py", "python", "script"),
        ("./scripts/build.sh release", "script", ""),
        ("/usr/bin/git -C /src/app status --short", "git", "status"),
        ("git -c core.pager=cat log -3 | head", "git", "log"),
        ("gh pr view 12 --json title", "gh", "pr:view"),
        ("sudo -u deploy docker compose up -d", "docker", "compose:up"),
        ("sleep 5 && curl -s http://localhost", "curl", ""),
        ("ls -la", "ls", ""),
        ("echo hi && sed -n 1,5p a.txt", "echo", ""),
        ("if [ -f a ]; then make test; fi", "make", "test"),
        ("for f in *.go; do gofmt -w $f; done", "gofmt", ""),
        ("cat > a.py <<'EOF'\ngit push --force\nEOF\npytest a.py", "pytest", ""),
        ("cat > .env <<\\EOF\nhunter is bob\nEOF\npytest a.py", "pytest", ""),
        ("cat <<'END OF'\nhunter is bob\nEND OF\npytest a.py", "pytest", ""),
        ('cat <<"*** END"\nhunter is bob\n*** END\npytest a.py', "pytest", ""),
        ("cat <<END-OF\nhunter is bob\nEND-OF\npytest a.py", "pytest", ""),
        ("cat <<!\nhunter is bob\n!\npytest a.py", "pytest", ""),
        ("cat <<-E\n\thunter is bob\n\tE\npytest a.py", "pytest", ""),
        ("cat <<A <<B\nhunter is\nA\nbob is\nB\npytest a.py", "pytest", ""),
        ("cat <<EOF\nEOFs are hard\nhunter is bob\nEOF\npytest a.py", "pytest", ""),
        ("cat <<EOF\nhunter is bob\n EOF\n", "cat", ""),
        ("".join(f"cat <<E{i}\nhunter is bob\nE{i}\n" for i in range(9)), "cat", ""),
        ("grep -c x <<<pytest && make lint", "make", "lint"),
        ("users=(hunter $(id bob) bob); go test ./...", "go", "test"),
        ("case $x in\n  hunter) pytest;;\n  a|bob) ls;;\nesac\n", "pytest", ""),
        ("case $x in hunter|bob) ls;; *) ls;; esac; make lint", "make", "lint"),
        ("git commit -m \"$(cat <<'EOF'\nmake everything\nEOF\n)\"", "git", "commit"),
        ("git add . \\\n  && git commit -m x \\\n  && git push", "git", "push"),
        ("! grep -q x y", "grep", ""),
        ("& 'C:\\tools\\dotnet.exe' build", "dotnet", "build"),
        ("go test ./... > out.txt 2>&1 &", "go", "test"),
        ("", UNKNOWN, ""),
        ("# nothing but a comment", UNKNOWN, ""),
    ],
)
def test_the_program_a_commands_time_depends_on(command: str, program: str, sub: str) -> None:
    found = parse_shell(command)
    assert (found.program, found.sub) == (program, sub)


def test_what_else_is_read() -> None:
    found = parse_shell("sleep 2m; sleep 3; for i in 1 2; do timeout 9 curl x | tee y; done &")
    assert found.sleep_s == 123
    assert found.timeout_s == 9
    assert (found.loops, found.detached, found.pipes, found.here_doc) == (True, True, 1, False)


SECRETS = [
    "hunter2",
    "swordfish-pw-1",
    "AKIAIOSFODNN7EXAMPLE",
    "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
    "ghp_16C7e42F292c6912E7710c838347Ae178B4a",
    "sk-proj-abcdefghijklmnop",
    "xoxb-123-abc",
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIi.c2ln",
    "s3cr3t_value",
]

LEAKY = [
    "PASSWORD={s} ./deploy.sh",
    "export TOKEN={s}",
    "export TOKEN='{s}' && npm publish",
    "curl -H 'Authorization: Bearer {s}' https://api.example.com",
    "curl -u admin:{s} https://example.com/{s}",
    "git clone https://user:{s}@github.com/a/b.git",
    "git push https://{s}@github.com/a/b",
    "git {s}",
    "mysql -u root -p{s} db",
    "docker login -u bob -p {s} registry",
    "docker --config {s} login",
    "kubectl --token {s} get pods",
    "gh --unknown {s} pr view",
    "sudo --prompt {s} {s}",
    "sshpass -p {s} ssh host",
    "echo {s} | docker login --password-stdin",
    "vault login {s}",
    "aws configure set aws_secret_access_key {s}",
    "psql postgres://u:{s}@h/db",
    "redis-cli -a {s} ping",
    "make deploy TOKEN={s}",
    "make --eval {s} all",
    "npm --token {s} run {s}",
    "bash -c 'PASSWORD={s} ./x {s}'",
    "cat > .env <<EOF\nSECRET={s}\n{s}\nEOF",
    "cat <<'E' | python3 -\nkey = '{s}'\nE",
    "python -m {s}",
    "/home/{s}/bin/run {s}",
    "~/{s}/{s}",
    "{s}",
    "'{s}' x",
    "npx {s}@{s}",
    "$env:TOKEN = '{s}'; ./build.ps1",
    "openssl enc -k {s}",
    "# {s}\nls",
    'echo "{s}',
    "`{s}`",
    "$({s})",
    "uv run --env-file {s} {s}",
    "op run --token {s} -- {s}",
]


@pytest.mark.parametrize("secret", SECRETS)
@pytest.mark.parametrize("command", LEAKY)
def test_no_secret_comes_out(command: str, secret: str) -> None:
    found = parse_shell(command.replace("{s}", secret))
    kept = " ".join((found.program, found.sub, found.second)).lower()
    assert secret.lower() not in kept
    for part in secret.lower().replace("_", "-").split("-"):
        assert len(part) < 5 or part not in kept


@settings(deadline=None)
@given(st.text(max_size=400))
def test_a_kept_word_is_short_and_plain(text: str) -> None:
    for word in (safe_word(text), *parse_shell(text)[:2]):
        assert len(word) <= 49
        assert not set(word) & set("/\\=@$'\"<>|&; \n\t")


HOSTILE = [
    "'" * 1_000_000,
    '"' * 1_000_000,
    "\0" * 1_000_000,
    "$(" * 500_000,
    "<<A\n" * 250_000,
    "\\" * 1_000_000,
    "a" * 1_000_000,
    "${" * 500_000,
    "`" * 1_000_000,
    "(" * 1_000_000,
    "'\"\\" * 300_000,
    "a=b " * 250_000,
    "timeout " * 100_000,
    "bash -c " * 100_000,
    'bash -c "' * 100_000,
    "# " * 500_000,
    '"\\' * 500_000,
    "a;" * 500_000,
    "- " * 500_000,
    "\ud800" * 1000,
    "𝔘" * 300_000,
]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_commands_cost_a_millisecond_at_most(text: str) -> None:
    assert cpu_s(lambda: parse_shell(text)) < plain_python_s()


@pytest.mark.parametrize(
    ("program", "sub", "kept"),
    [
        ("git", "commit", ("git", "commit")),
        ("docker", "compose:up", ("docker", "compose:up")),
        ("make", "hunter", ("make", UNKNOWN)),
        ("python3", "inline", ("python3", "inline")),
        ("script", "", ("script", "")),
        ("general-purpose", "", ("general-purpose", "")),
        ("", "", ("", "")),
        ("hunter", "is", (UNKNOWN, "")),
    ],
)
def test_only_well_known_words_are_for_others_to_read(
    program: str, sub: str, kept: tuple[str, str]
) -> None:
    assert well_known(program, sub) == kept
