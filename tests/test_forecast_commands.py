"""``cachewise forecast``: what a person at a terminal gets."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gateway.config import ConfigError
from gateway.dialects.turn import ToolCall
from gateway.forecast_commands import app
from gateway.predictor import Context, store


def run(*arguments: str | Path) -> str:
    result = CliRunner().invoke(
        app, [str(each) for each in arguments], catch_exceptions=False, env={"COLUMNS": "140"}
    )
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def state(tmp_path: Path) -> Path:
    predictor = store.priors()
    call = ToolCall.of("", "Bash", '{"command": "just zap"}')
    for number in range(250):
        forecast = predictor.forecast([call], "tool", Context(number, "acme"))
        predictor.observe(forecast, 900.0)
    path = tmp_path / "state.npz"
    store.Snapshot(predictor).write(path)
    return path


def test_inspect_shows_what_is_known_of_each_tool_and_draws_it(state: Path, tmp_path: Path) -> None:
    told = run("inspect", "--state", state, "--level", "tenant", "--plot", tmp_path / "p.png")
    row = next(line for line in told.splitlines() if "just zap" in line)
    assert "acme Bash just zap" in row
    assert row.count(" min") == 4
    assert "returns after tool" in told
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_without_a_state_inspect_shows_the_priors(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert "the shipped priors" in run("inspect", "--level", "kind")


def test_what_one_gateway_exports_another_imports(state: Path, tmp_path: Path) -> None:
    file, other = tmp_path / "learned.json", tmp_path / "other.npz"
    run("export", file, "--state", state)
    assert json.loads(file.read_bytes())["observed_total"] == 250
    run("import", file, "--state", other)
    learned = store.load(other).forecast(
        [ToolCall.of("", "Bash", '{"command": "just zap"}')], "tool", Context("new", "acme")
    )
    assert 400 < learned.median_s < 1800


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["inspect", "--state", "/nonexistent"], "--state: /nonexistent does not exist"),
        (["inspect", "--level", "x"], "--level: 'x'; allowed: all, kind"),
        (["import", "/nonexistent"], "/nonexistent: No such file"),
        (["import", __file__], "is no export"),
        (["export", "/nonexistent/x.json"], "/nonexistent/x.json: No such file"),
        (["inspect", "--plot", "/nonexistent/x.png"], "--plot: /nonexistent/x.png"),
        (["train", "--data", "/nonexistent"], "no tool-calls"),
    ],
)
def test_what_is_wrong_is_said_with_what_is_allowed(arguments: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told.replace("*", ".")):
        CliRunner().invoke(app, arguments, catch_exceptions=False)


def test_an_export_of_a_later_format_is_named_as_such(tmp_path: Path) -> None:
    file = tmp_path / "later.json"
    file.write_text('{"format": 999}')
    with pytest.raises(ConfigError, match=r"later\.json is of a newer format; allowed: \d+$"):
        run("import", file, "--state", tmp_path / "s.npz")


def test_what_is_imported_where_nothing_is_counts_once(state: Path, tmp_path: Path) -> None:
    first, second, copied = tmp_path / "1.json", tmp_path / "2.json", tmp_path / "copy.npz"
    run("export", first, "--state", state)
    run("import", first, "--state", copied)
    run("export", second, "--state", copied)
    one, two = json.loads(first.read_text()), json.loads(second.read_text())
    assert two["observed_total"] == one["observed_total"]
    weights = [{str(n["key"]): n["stats"][0] for n in told["nodes"]} for told in (one, two)]
    assert weights[1] == pytest.approx(weights[0], rel=1e-3)
