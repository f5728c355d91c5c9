"""``python -m bench.forecast --data DIR``: the table of methods, ours beside them; JSON and a plot.

Cross-validated by session: whatever forecasts a session was fitted on others. Within the session a
method sees each call's time before the next call, as a gateway does. The sessions of a fold learn
nothing from one another: each is the first on a fresh install.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from bench import machine
from bench.forecast import newcomer, plot
from bench.forecast.baselines import baselines, calls_of, run
from bench.forecast.ours import Outcomes, cost, fitted, run_calls, run_gaps
from bench.forecast.scores import FLOOR_S, INSTANT_CAPS_S, coverage, errors, instants, ranking
from gateway.predictor import Predictor, store
from gateway.predictor.features import features_of
from gateway.predictor.train import TREES, Recorded, load

RESULTS = Path(__file__).resolve().parents[1] / "results"
FOLDS = 5
SLOW_S = 5.0
EACH = "each repository in turn"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of tool-calls*.jsonl.gz")
    parser.add_argument(
        "--shipped",
        action="store_true",
        help="score the shipped priors on all of the data, which must not be what they were"
        " trained on; no cross-validation",
    )
    parser.add_argument("--trees", type=int, default=TREES)
    parser.add_argument("--folds", type=int, default=FOLDS)
    parser.add_argument("--skip-repositories", action="store_true", help="leave out the slow part")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()

    sessions = load(options.data)
    order = np.random.default_rng(11).permutation(len(sessions))
    numbered = [(int(i), sessions[int(i)]) for i in order]
    folds = [numbered[i :: options.folds] for i in range(options.folds)]
    result: dict[str, Any] = {
        "machine": machine.described(),
        "sessions": len(sessions),
        "calls": sum(len(turn.calls) for s in sessions for turn in s.turns),
        "floor_s": FLOOR_S,
        "methods": {},
    }
    heads()

    if options.shipped:
        folds = [numbered]
    calls, gaps, waits, taught = Outcomes(), Outcomes(), Outcomes(), Outcomes()
    scored: dict[str, list[float]] = {}
    micros: dict[str, list[float]] = {}
    truth: list[float] = []
    owners: list[int] = []
    spent: list[tuple[float, float]] = []
    for fold in folds:
        inside = {number for number, _ in fold}
        training = [s for i, s in enumerate(sessions) if i not in inside]
        test = [session for _, session in fold]
        for number, session in fold:
            times = [duration_s for _, duration_s in calls_of([session])]
            truth += times
            owners += [number] * len(times)
        for baseline in baselines():
            baseline.fit(training or sessions)
            predicted, us = run(baseline, test)
            scored.setdefault(baseline.name, []).extend(predicted)
            micros.setdefault(baseline.name, []).append(us)

        def fresh(training: list[Recorded] = training) -> Predictor:
            return store.priors() if options.shipped else fitted(training, options.trees)

        extend(calls, run_calls(fresh(), fold))
        extend(gaps, run_gaps(fresh(), fold))
        extend(waits, run_gaps(fresh(), fold, with_humans=True))
        extend(taught, run_calls(fresh(), fold, learn_shared=True))
        spent.append(cost(fresh(), test[:60]))
    actual, owner = np.array(truth), np.array(owners)
    for name, predicted in scored.items():
        line = point_scores(np.array(predicted), np.array(predicted), actual, owner)
        line["predict_us"] = float(np.mean(micros[name]))
        result["methods"][name] = line
        show(name, line)
    forecast_us, observe_us = (float(v) for v in np.mean(spent, axis=0))
    line = scores_of(calls) | {"predict_us": forecast_us, "observe_us": observe_us}
    result["methods"]["ours"] = line
    show("ours", line)
    result["taught"] = scores_of(taught)
    show("ours, learning from one test session for the next", result["taught"])
    result["gaps"] = scores_of(gaps)
    show("ours, whole gaps of parallel calls", result["gaps"])
    print(f"\nforecast {forecast_us:.0f} µs, observe {observe_us:.0f} µs, CPU, one at a time")

    result["calibration"] = calibration(calls)
    result["calibration_of_gaps"] = calibration(gaps)
    print("\ncoverage of the 50, 80, 95 % intervals")
    for kind, row in result["calibration"].items():
        shares = "  ".join(f"{100 * share:5.1f}" for share in row["coverage"])
        print(f"  {kind:12} {row['calls']:7}  {shares}")

    result["instants"] = at_instants(gaps, waits)
    for what, values in result["instants"].items():
        print(
            f"at random instants, {what}: " + ", ".join(f"{k} {v:.3f}" for k, v in values.items())
        )

    known = store.priors() if options.shipped else fitted([s for _, s in folds[0]], options.trees)
    known.learn_shared = True
    result["newcomer"] = {
        name: newcomer.learn(known, times_s, f"never_seen_{number}")
        for number, (name, times_s) in enumerate(newcomer.tools(sessions).items())
    }
    print("\na new tool after 200 gaps: loss over that of the best fixed curve")
    for name, row in result["newcomer"].items():
        print(f"  {name:24} {row['ratio']:.2f}")

    options.out.mkdir(parents=True, exist_ok=True)
    keep(result, calls, options.out)
    if not options.shipped and not options.skip_repositories:
        result["held_out"] = held_out(sessions, numbered, options.trees)
        keep(result, calls, options.out)
        result["learning_curve"] = learning_curve(folds, sessions, options.trees)
        keep(result, calls, options.out)


def keep(result: dict[str, Any], calls: Outcomes, folder: Path) -> None:
    (folder / "forecast.json").write_text(json.dumps(result, indent=1) + "\n")
    plot.draw(result, calls, folder / "forecast.png")


def extend(whole: Outcomes, part: Outcomes) -> None:
    whole.actual_s += part.actual_s
    whole.forecasts += part.forecasts
    whole.kinds += part.kinds
    whole.sessions += part.sessions


def point_scores(score: Any, predicted_s: Any, actual_s: Any, owner: Any) -> dict[str, float]:
    error = errors(predicted_s, actual_s)
    floored = np.maximum(actual_s, FLOOR_S)
    return {
        "median_error": float(np.median(error)),
        "p90_error": float(np.quantile(error, 0.9)),
        "ranking_fresh": ranking(score, floored, owner),
        "ranking_over_5_s": ranking(score, floored, owner, SLOW_S),
        "median_error_unfloored": float(
            np.median(
                np.abs(
                    np.log10(np.maximum(predicted_s, 1e-3)) - np.log10(np.maximum(actual_s, 1e-3))
                )
            )
        ),
    }


def scores_of(outcomes: Outcomes) -> dict[str, float]:
    return point_scores(
        outcomes.score,
        outcomes.median_s,
        np.array(outcomes.actual_s),
        np.array(outcomes.sessions),
    )


def heads() -> None:
    print(f"{'':48} median    p90   rank   rank    µs")
    print(f"{'':48}  error  error  fresh  > 5 s")


def show(name: str, line: dict[str, float]) -> None:
    us = f"{line['predict_us']:6.0f}" if "predict_us" in line else ""
    print(
        f"{name:48} {line['median_error']:6.3f} {line['p90_error']:6.3f}"
        f" {line['ranking_fresh']:6.3f} {line['ranking_over_5_s']:6.3f}{us}",
        flush=True,
    )


def calibration(outcomes: Outcomes) -> dict[str, dict[str, Any]]:
    """Coverage overall and for each tool kind with 500 calls or more."""
    reached, kinds = outcomes.reached, np.array(outcomes.kinds)
    found = {"all": {"calls": len(reached), "coverage": coverage(reached)}}
    for kind in sorted(set(outcomes.kinds)):
        of_kind = reached[kinds == kind]
        if len(of_kind) >= 500:
            found[kind] = {"calls": len(of_kind), "coverage": coverage(of_kind)}
    return found


def at_instants(gaps: Outcomes, waits: Outcomes) -> dict[str, dict[str, float]]:
    """Ranking of what remains at a random instant of a wait, tools' alone and people's too."""
    found = {}
    for what, outcomes in (("tools", gaps), ("tools and people", waits)):
        actual = np.array(outcomes.actual_s)
        for cap_s in INSTANT_CAPS_S:
            which, elapsed = instants(actual, cap_s)
            remains = actual[which] - elapsed
            owner = np.array(outcomes.sessions)[which]
            human = np.array([outcomes.kinds[i] == "human" for i in which])
            chosen = [outcomes.forecasts[i] for i in which]
            ours = [f.quantile(0.5, float(e)) for f, e in zip(chosen, elapsed, strict=True)]
            found[f"{what}, up to {cap_s:.0f} s"] = {
                "elapsed time": ranking(elapsed, remains, owner),
                "elapsed time + machine/human": ranking(elapsed + 1e9 * human, remains, owner),
                "ours": ranking(np.array(ours), remains, owner),
            }
    return found


def held_out(
    sessions: list[Recorded], numbered: list[tuple[int, Recorded]], trees: int
) -> dict[str, dict[str, Any]]:
    """A repository at a time left out of training, and a whole organisation."""
    names = sorted({session.source for session in sessions})
    groups = {"entireio/*": [n for n in names if n.startswith("entireio/")]}
    groups |= {name: [name] for name in names}
    found: dict[str, dict[str, Any]] = {}
    pooled = Outcomes()
    print("\nheld out")
    for group, inside in groups.items():
        training = [s for s in sessions if s.source not in inside]
        test = [(i, s) for i, s in numbered if s.source in inside]
        predictor = fitted(training, trees, calibrate=False)
        outcomes = run_calls(predictor, test)
        if len(inside) == 1:
            extend(pooled, outcomes)
        fresh = scores_of(outcomes)
        show(f"  {group} ({len(test)} sessions)", fresh)
        live = scores_of(run_calls(predictor, test, learn_shared=True))
        show("    learning from one of them for the next", live)
        limit = hindsight(test)
        found[group] = fresh | {"sessions": len(test), "live": live, "hindsight": limit}
        print(f"    {'hindsight (see docs)':58} {limit:6.3f}", flush=True)
    found[EACH] = scores_of(pooled) | {"sessions": len(set(pooled.sessions))}
    show(f"  {EACH}, all calls together", found[EACH])
    return found


def hindsight(test: list[tuple[int, Recorded]]) -> float:
    """Ranking of calls by the median time of the same session's calls of the same tool, program and
    subcommand, later ones and the call itself included: what a method could hardly surpass that
    knows a command by these."""
    times: dict[tuple[object, ...], list[float]] = {}
    commands, actual, owners = [], [], []
    for number, session in test:
        for turn in session.turns:
            for call, duration_s in zip(turn.calls, turn.durations_s, strict=True):
                words, _ = features_of(call)
                command = number, words.tool, words.program, words.sub
                times.setdefault(command, []).append(duration_s)
                commands.append(command)
                actual.append(max(duration_s, FLOOR_S))
                owners.append(number)
    medians = {command: float(np.median(of)) for command, of in times.items()}
    score = np.array([max(medians[command], FLOOR_S) for command in commands])
    return ranking(score, np.array(actual), np.array(owners))


def learning_curve(
    folds: list[list[tuple[int, Recorded]]], sessions: list[Recorded], trees: int
) -> list[dict[str, float]]:
    """Scores by how many sessions were trained on; and how many the hierarchy alone saw online."""
    test = folds[0]
    inside = {number for number, _ in test}
    rest = [session for i, session in enumerate(sessions) if i not in inside]
    rest = [rest[int(i)] for i in np.random.default_rng(2).permutation(len(rest))]
    found = []
    print("\nby sessions seen before")
    for n in (0, 10, 30, 100, len(rest)):
        predictor = fitted(rest[:n], trees, calibrate=False) if n else Predictor()
        row = scores_of(run_calls(predictor, test)) | {"sessions": n}
        found.append(row)
        show(f"  {n}", row)
    return found


if __name__ == "__main__":
    main()
