"""``cachewise forecast``: look at what was learned, carry it elsewhere, train the priors."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import orjson
import typer
from rich.console import Console
from rich.table import Table

from gateway.config import ConfigError, default_state_file

if TYPE_CHECKING:  # they import numpy: the other commands do without
    from gateway.predictor.forecast import Forecast
    from gateway.predictor.model import Predictor

app = typer.Typer(
    help="What the gateway has learned of when sessions come back.", no_args_is_help=True
)

State = Annotated[
    Path | None,
    typer.Option(help="File of what was learned; the default one of this user if not given."),
]
_QUANTILES = (0.1, 0.5, 0.9, 0.99)


def _predictor(state: Path | None) -> tuple[Predictor, Path | None]:
    """What the file holds, else the priors. Raises `ConfigError`."""
    from gateway.predictor import store

    path = state or default_state_file(os.environ)
    try:
        return store.read(path), path
    except FileNotFoundError:
        if state is not None:
            raise ConfigError(f"--state: {path} does not exist; allowed: a state file") from None
        return store.priors(), None
    except (OSError, store.StateError) as error:
        raise ConfigError(f"--state: {path} is not used: {error}; allowed: a state file") from None


def _learned(predictor: Predictor, levels: tuple[str, ...]) -> list[tuple[Any, float, Forecast]]:
    """Nodes of some levels: their name, weight and distribution; the heaviest first."""
    import numpy as np

    from gateway.predictor.forecast import Forecast
    from gateway.predictor.table import N

    found = []
    for key, row in predictor.table:
        if isinstance(key, tuple) and key[0] in levels:
            predictor.table.normalise(row)
            n = float(predictor.table.stats[row, N])
            counts = predictor.table.counts[row]
            if n > 0 and counts.sum() > 0:
                found.append((key, n, Forecast((counts / counts.sum()).astype(np.float32), 1, "")))
    return sorted(found, key=lambda node: -node[1])


@app.command("inspect")
def inspect(
    state: State = None,
    level: Annotated[
        str, typer.Option(help="kind, tool, program, sub, tenant, wait, or all.")
    ] = "all",
    rows: Annotated[int, typer.Option(help="Rows shown.", min=1, max=100_000)] = 60,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the survival curves into this PNG.")
    ] = None,
) -> None:
    """Show what is known of each tool: how much was seen, how long it takes."""
    levels = ("kind", "tool", "program", "sub", "tenant", "wait")
    if level != "all" and level not in levels:
        raise ConfigError(f"--level: {level!r}; allowed: all, {', '.join(levels)}")
    predictor, path = _predictor(state)
    shown = _learned(predictor, levels if level == "all" else (level,))
    table = Table(title=f"{path or 'the shipped priors'}: {len(predictor.table)} nodes")
    table.add_column("level")
    table.add_column("what")
    table.add_column("weight", justify="right")
    for q in _QUANTILES:
        table.add_column(f"p{round(100 * q)}", justify="right")
    for key, n, forecast in shown[:rows]:
        words = [word for word in key[1:] if word]
        table.add_row(
            key[0], " ".join(words), f"{n:.0f}", *(_time(forecast.quantile(q)) for q in _QUANTILES)
        )
    Console().print(table)
    for (idle_kind, kind), returns in sorted(predictor.returns.items()):
        print(f"returns after {idle_kind} {kind}: {returns.probability:.3f}")
    for client, overhead in predictor.overheads.items():
        print(f"{client} adds {_time(overhead.seconds)} to its tools' own time")
    if plot is not None:
        _draw(_learned(predictor, ("kind", "wait")), plot)
        print(f"drawn: {plot}")


def _time(seconds: float) -> str:
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"


def _draw(nodes: list[tuple[Any, float, Forecast]], path: Path) -> None:
    try:
        import matplotlib as mpl
    except ImportError:
        raise ConfigError(
            "--plot: matplotlib is not installed; allowed: after pip install matplotlib"
        ) from None
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    from gateway.predictor.grid import EDGES_S

    figure, axes = plt.subplots(figsize=(9, 5.5), layout="constrained")
    for key, n, forecast in nodes:
        axes.plot(
            EDGES_S[1:],
            [forecast.survival(t) for t in EDGES_S[1:]],
            label=f"{key[-1]} ({n:.0f})",
            linestyle="--" if key[0] == "wait" else "-",
        )
    axes.set(xscale="log", xlabel="seconds", ylabel="P(gap > t)", ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, ncols=2, title="waiting for (weight)")
    try:
        figure.savefig(path, dpi=130)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--plot: {path}: {error}; allowed: a path, as of a .png") from None
    plt.close(figure)


@app.command("export")
def export(
    file: Annotated[Path, typer.Argument(help="JSON file to write.")], state: State = None
) -> None:
    """Write what was learned as JSON, for other programs or another gateway."""
    from gateway.predictor import store
    from gateway.predictor.grid import EDGES_S

    predictor, _ = _predictor(state)
    snapshot = store.Snapshot(predictor)
    data = {
        "format": store.FORMAT,
        "edges_s": list(EDGES_S),
        "observed_total": snapshot.observed_total,
        "returns": snapshot.returns,
        "overheads": snapshot.overheads,
        "warps": snapshot.warps,
        "nodes": [
            {
                "key": key,
                "stats": [round(v, 5) for v in stats],
                "counts": {str(i): round(c, 4) for i, c in enumerate(counts) if c > 0},
            }
            for key, stats, counts in zip(
                snapshot.keys, snapshot.stats.tolist(), snapshot.counts.tolist(), strict=True
            )
        ],
    }
    try:
        file.write_bytes(orjson.dumps(data, option=orjson.OPT_INDENT_2))
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}; allowed: a file to write") from None
    print(f"{file}: {len(snapshot.keys)} nodes")


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="JSON file that export wrote.")], state: State = None
) -> None:
    """Merge an exported file into the state; without one, it is the state. Stop the gateway first:
    it would write over it."""
    import numpy as np

    from gateway.predictor import store
    from gateway.predictor.grid import BINS

    path = state or default_state_file(os.environ)
    try:
        data = orjson.loads(file.read_bytes())
        if data["format"] > store.FORMAT:
            raise ConfigError(f"{file} is of a newer format; allowed: {store.FORMAT}")
        counts = np.zeros((len(data["nodes"]), BINS), np.float32)
        for i, node in enumerate(data["nodes"]):
            for place, weight in node["counts"].items():
                counts[i, int(place)] = weight
        other = store.built(
            {
                "edges_s": data["edges_s"],
                "keys": [node["key"] for node in data["nodes"]],
                "returns": data["returns"],
                "overheads": data["overheads"],
                "warps": data["warps"],
                "observed_total": data["observed_total"],
            },
            {"stats": np.array([node["stats"] for node in data["nodes"]]), "counts": counts},
        )
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}; allowed: a readable file") from None
    except ConfigError:
        raise
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise ConfigError(f"{file} is no export ({error}); allowed: what export wrote") from None
    try:
        predictor = store.read(path)
        came = store.merge(predictor, other)
    except FileNotFoundError:
        predictor, came = other, len(other.table)
    except (OSError, store.StateError) as error:
        raise ConfigError(f"--state: {path} is not used: {error}; allowed: a state file") from None
    try:
        store.Snapshot(predictor).write(path)
    except OSError as error:
        raise ConfigError(f"--state: {path}: {error.strerror}; allowed: a file to write") from None
    print(f"{path}: {came} nodes merged in, {len(predictor.table)} in all")


@app.command("train")
def train(
    data: Annotated[Path, typer.Option(help="Folder of tool-calls*.jsonl.gz and tool-turns*.")],
    out: Annotated[
        Path | None, typer.Option(help="File to write; the package's priors if not given.")
    ] = None,
    trees: Annotated[
        int, typer.Option(help="Trees of the correction; 0 for the usual number.", min=0)
    ] = 0,
) -> None:
    """Train the priors from recorded sessions (needs the extra: train)."""
    from gateway.predictor import store
    from gateway.predictor import train as training

    out = out or store.PRIORS
    try:
        sessions = training.load(data)
        predictor = training.trained(sessions, trees or training.TREES)
    except FileNotFoundError as error:
        raise ConfigError(f"--data: {error}") from None
    except ImportError as error:
        raise ConfigError(f"{error}; install the extra: pip install '.[train]'") from None
    store.Snapshot(predictor, with_correction=True).write(out)
    print(f"{out}: {len(predictor.table)} nodes from {len(sessions)} sessions")
