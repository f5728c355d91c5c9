"""The picture: ranking of the methods, calibration, the learning curve."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from bench.forecast.ours import Outcomes


def draw(result: dict[str, Any], calls: Outcomes, path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.6), layout="constrained")
    methods = result["methods"]
    names = list(methods)
    place = np.arange(len(names))
    left.barh(place - 0.2, [methods[n]["ranking_fresh"] for n in names], 0.4, label="fresh")
    left.barh(place + 0.2, [methods[n]["ranking_over_5_s"] for n in names], 0.4, label="> 5 s")
    left.set_yticks(place, names, fontsize=8)
    left.set(xlim=(0.5, 1), xlabel="ranking (0.5 is chance)")
    left.invert_yaxis()
    left.legend(fontsize=8)

    grid = np.linspace(0.01, 0.99, 99)
    reached, kinds = calls.reached, np.array(calls.kinds)
    for kind, row in result["calibration"].items():
        of_kind = reached if kind == "all" else reached[kinds == kind]
        middle.plot(
            grid,
            [(of_kind <= q).mean() for q in grid],
            label=f"{kind} ({row['calls']})",
            linewidth=2.5 if kind == "all" else 1,
        )
    middle.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
    middle.set(xlabel="forecast quantile", ylabel="share of calls below", title="calibration")
    middle.legend(fontsize=8)

    curve = result.get("learning_curve", [])
    if curve:
        seen = [max(row["sessions"], 1) for row in curve]
        right.plot(seen, [row["ranking_fresh"] for row in curve], "o-", label="ranking, fresh")
        right.plot(seen, [row["median_error"] for row in curve], "s-", label="median error")
        right.set(xscale="log", xlabel="sessions trained on", title="learning curve")
        right.grid(alpha=0.3)
        right.legend(fontsize=8)
    else:
        right.axis("off")
    figure.savefig(path, dpi=120)
    plt.close(figure)
