"""The words of shells: which programs are wrappers, which have subcommands, which take time."""

from __future__ import annotations

from typing import Final


def words(text: str) -> frozenset[str]:
    return frozenset(text.split())


KNOWN_WITH_DIGITS: Final = words(
    """
    python2 python3 pip3 ipython3 base64 md5sum sha1sum sha256sum sqlite3 k9s k3s k3d k6 s3 s3api
    s3cmd s5cmd ec2 gpg2 7z bzip2 m4 route53 e2e test:e2e test:e2e:ci build:e2e e2e:ci i18n l10n
    markdownlint-cli2 ps2pdf lua5.1 wasm32 g++ c++
    """
)
TRIVIAL: Final = words(
    """
    cd echo export set unset source . pwd true false : test [ [[ printf head tail cat wc sort
    uniq cut tr tee exit return read local declare shift pushd popd alias eval trap umask ulimit
    jq then else do done fi esac if for while until case in select function { } ! grep sed awk
    ls mkdir touch rm cp mv basename dirname date whoami which type command dig chmod column
    """
)
"""Commands that take no time to speak of beside others in the same line."""
KEYWORDS: Final = words("then else elif do if while until ! { } time")
LOOPS: Final = frozenset(("for", "while", "until"))
WRAPPERS: Final = {
    # a wrapper: how many words of its own follow its options
    "sudo": 0, "doas": 0, "env": 0, "nohup": 0, "nice": 0, "ionice": 0, "time": 0, "command": 0,
    "exec": 0, "builtin": 0, "stdbuf": 0, "setsid": 0, "caffeinate": 0, "xargs": 0, "watch": 0,
    "unbuffer": 0, "chronic": 0, "timeout": 1, "gtimeout": 1, "flock": 1, "rtk": 0, "winpty": 0,
}  # fmt: skip
WRAPPER_VALUES: Final = words(
    """
    -u -n -k -s -c -C -i -o -e -I -P -L -d -g --signal --kill-after --adjustment --user
    """
)
"""Options of wrappers whose value is the next word."""
RUNNERS: Final = {
    # a runner: its subcommands that run what follows ("" = it does so at once)
    "uv": ("run",), "poetry": ("run",), "pdm": ("run",), "hatch": ("run",), "pipenv": ("run",),
    "rye": ("run",), "conda": ("run",), "mise": ("exec", "x"), "devbox": ("run",),
    "npx": ("",), "bunx": ("",), "uvx": ("",), "pipx": ("run",), "dotenv": ("",), "op": ("run",),
    "bundle": ("exec",), "pnpm": ("exec", "dlx"), "yarn": ("exec", "dlx"), "npm": ("exec",),
    "bun": ("x",), "docker": (), "direnv": ("exec",),
}  # fmt: skip
SCRIPTS: Final = (".sh", ".py", ".js", ".ts", ".mjs", ".ps1", ".rb")
SHELLS: Final = frozenset(["bash", "sh", "zsh", "dash", "fish", "ksh"])
INTERPRETERS: Final = words(
    """
    python python3 node ruby perl php deno bun tsx ts-node java osascript
    """
)
HAS_SUBCOMMAND: Final = words(
    """
    git gh glab go cargo npm pnpm yarn bun deno uv pip pip3 poetry pdm hatch docker podman
    docker-compose kubectl helm terraform tofu aws gcloud az make just task mise rake bundle
    dotnet gradle gradlew ./gradlew mvn mvnw brew apt apt-get dnf systemctl nx turbo lerna
    vercel wrangler flyctl fly heroku supabase firebase prisma alembic django-admin flutter dart
    swift xcodebuild mix rustup golangci-lint ruff pre-commit conda bazel buck2 cmake ninja svn
    hg jj bd entire agentv workmux codex claude gemini opencode tmux vault nomad consul composer
    artisan sbt lein stack cabal opam nix pytest-xdist linear
    """
)
"""Programs whose first plain word is a command of its own."""
HEAVY: Final = words(
    """
    test tests check build install ci lint clippy fmt push pull clone fetch publish deploy e2e
    typecheck bench run up verify validate compile watch view create wait apply plan
    """
)
"""Subcommands that outlast what stands beside them."""
HEAVY_PROGRAMS: Final = words(
    """
    pytest vitest jest mocha playwright cypress tsc eslint mypy golangci-lint webpack vite
    rollup gradle gradlew mvn make cmake ninja xcodebuild cargo docker tox nox sleep wait curl
    wget ssh rsync scp terraform helm kubectl ansible-playbook ffmpeg claude codex
    """
)
RUN_SCRIPTS: Final = frozenset(("npm", "pnpm", "yarn", "bun", "mise", "deno"))
OPEN: Final = words(
    """
    npm pnpm yarn bun make just task mise rake nx turbo bd entire agentv workmux gradle gradlew
    linear artisan composer
    """
)
"""Programs whose subcommands are a project's own names."""
NOUNS: Final = frozenset(["pr", "issue", "run", "repo", "release", "compose", "workflow"])
SUBCOMMANDS: Final = words(
    """
    add am api apply apps archive audit auth bisect blame branch build bundle cache cat-file
    check check-ignore checkout checks cherry cherry-pick ci clean clippy clone close comment
    commit commit-tree compose config configure console cp create daemon delete deploy describe
    destroy diff diff-tree doc doctor down download edit env events exec exec-server explain
    export fetch filter-branch fix fmt for-each-ref format fsck gc generate get get-url grep
    hash-object help hooks images import info init inspect install issue kill lint list lfs link
    login log logs ls ls-files ls-remote ls-tree merge merge-base merge-file metadata migrate
    mod mv name-rev new notes outdated pack pack-objects plan pr ps prune publish pull push
    range-diff ready read-tree rebase receive-pack reflog release remote remove repack repo
    rerun reset restart restore rev-list rev-parse revert review rm rollback rollout run s3 sync
    scale search serve session show show-ref shortlog sparse-checkout start stash stats status
    stop submodule switch symbolic-ref symlink tag task test tidy tool top tree uninstall unlink
    up update update-index update-ref upgrade validate var verify version vet view volume wait
    watch web whatchanged work workflow workspace worktree write-tree why x dlx t typecheck dev
    preview coverage e2e bench lint:fix format:check test:unit test:integration test:e2e test:ci
    sbom send-keys capture-pane new-session kill-session list-sessions list-panes attach dep
    deps freeze lock compile develop wheel sdist shell nextest llvm-cov expand all assemble
    bootRun jar package site lifecycle makemigrations runserver collectstatic
    """
)
PLAIN: Final = TRIVIAL - KEYWORDS - frozenset(WRAPPERS) - SHELLS
"""Of these no further word is looked at."""
KNOWN: Final = (
    HAS_SUBCOMMAND
    | HEAVY_PROGRAMS
    | TRIVIAL
    | INTERPRETERS
    | SHELLS
    | frozenset(WRAPPERS)
    | frozenset(RUNNERS)
    | words(
        """
    rg fd find diff cmp tar gzip unzip zip gofmt goimports prettier biome black isort flake8
    pylint pyright vale shellcheck actionlint markdownlint-cli2 psql mysql sqlite3 redis-cli
    mongosh openssl gpg ps top kill pkill lsof netstat df du stat file xxd hexdump md5sum
    sha256sum base64 nl bat exa tokei cloc clang gcc g++ clang-format javac kotlinc scala rustc
    bazelisk wsl pdftotext pandoc convert mktemp ping nslookup ssh-keygen crontab
    """
    )
)
"""Programs of that name are taken to be the well-known ones, wherever they lie."""
OPTION_VALUES: Final = words(
    """
    -C -c -f -n -p --prefix --project --filter --with --directory --cwd --package --file
    --namespace --context --repo -R --manifest-path --python --profile --region --config
    """
)
"""Options before a subcommand whose value is the next word."""
AGENTS: Final = words(
    """
    general-purpose general explore plan fork statusline-setup claude-code-guide default explorer
    worker
    """
)
"""Types of sub-agents that Claude Code, Codex and OpenCode bring along, in lower case."""
