"""What deciding costs a turn: `python -m bench.admission`.

Sessions in a closed loop over a fleet, in virtual time, through the gateway's own code from the
parsed turn on: the ask, admission and routing, the pod's start, the end with its forecast. Half of
the sessions fit, so that turns are held and released. Two figures: with the forecast's drawing and
without.
"""

import heapq
import statistics
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Annotated

import orjson
import typer
from rich.console import Console
from rich.table import Table

from gateway.admission import Admission, Ask, Ended, QueueFull, Ticket
from gateway.conductor import Conductor, Run
from gateway.dialects.turn import ToolCall
from gateway.fleet.pod import Pod
from gateway.predictor import Context
from gateway.predictor.store import priors
from gateway.routing import Arrival
from gateway.waits import Fixed

RESULTS = Path(__file__).resolve().parents[1] / "results"
BAR_US = 200
TURN_S = 4.0
GAPS_S = (0.5, 1.0, 1.5, 4.0, 20.0)
TICK_S = 0.5
CAPACITY_TOKENS = 700_000


class Load:
    """The sessions, the fleet and the clock; every call into the gateway's code is timed."""

    def __init__(self, sessions: int, pods: int, tokens: int) -> None:
        self.pods = [Pod(f"pod-{n}", f"http://pod-{n}", ready=True) for n in range(pods)]
        for pod in self.pods:
            pod.models = {"m": None}
            pod.residency.set_capacity(CAPACITY_TOKENS)
        self.admission = Admission(self._released)
        self.conductor = Conductor(self.admission)
        self.predictor = priors()
        self.sessions = sessions
        self.tokens = tokens
        self.turns = [0] * sessions
        self.home: dict[int, str] = {}
        self.now = 0.0
        self.held = 0
        self.spent_s = {"arrive": 0.0, "end": 0.0, "forecast": 0.0, "tick": 0.0}
        self.latest_us: list[float] = []
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.order = count()
        for n in range(sessions):
            self.at(n * 0.02, lambda n=n: self.arrive(n))  # type: ignore[misc]
        self.at(TICK_S, self.tick)

    def at(self, at_s: float, event: Callable[[], None]) -> None:
        heapq.heappush(self.events, (at_s, next(self.order), event))

    def run(self, turns: int) -> None:
        """Until so many more turns have ended."""
        goal = sum(self.turns) + turns
        while sum(self.turns) < goal:
            for _ in range(50):
                self.now, _, event = heapq.heappop(self.events)
                event()

    def arrive(self, n: int) -> None:
        prompt_tokens = self.tokens + self.tokens * min(self.turns[n], 40) // 100
        heads = [(n + 1_000_000, self.tokens // 2), (n % 8, 9_000), (0, 6_000)]
        began = time.process_time()
        ask = Ask(
            Arrival(f"s{n}", prompt_tokens, int(0.97 * prompt_tokens), heads, self.home.get(n)), "m"
        )
        try:
            ticket = self.conductor.arrive(ask, self.pods, self.now)
        except QueueFull:
            self.at(self.now + 5, lambda: self.arrive(n))
            return
        spent_s = time.process_time() - began
        self.spent_s["arrive"] += spent_s
        self.latest_us.append(spent_s * 1e6)
        ticket.context = n
        if ticket.held:
            self.held += 1
        else:
            self._released(ticket)

    def _released(self, ticket: Ticket) -> None:
        n = ticket.context
        assert isinstance(n, int)
        run = self.conductor.start(ticket, self.now)
        self.at(self.now + TURN_S, lambda: self.end(n, run))

    def end(self, n: int, run: Run) -> None:
        self.conductor.first_token(run, self.now - TURN_S / 2)
        self.turns[n] += 1
        began = time.process_time()
        call = ToolCall.of(f"c{self.turns[n]}", "bash", '{"command": "python -m pytest -q"}')
        forecast = Fixed.of(self.predictor.forecast([call], "tool", Context(f"s{n}")))
        drawn = time.process_time()
        decision = run.ticket.decision
        self.conductor.end(
            run,
            self.now,
            Ended(decision.prompt_tokens, 300, decision.resident_tokens, "tool", forecast),
        )
        self.spent_s["forecast"] += drawn - began
        self.spent_s["end"] += time.process_time() - drawn
        self.home[n] = run.pod.name
        gap_s = GAPS_S[(n + 7 * self.turns[n]) % len(GAPS_S)]
        self.at(self.now + gap_s, lambda: self.arrive(n))

    def tick(self) -> None:
        began = time.process_time()
        self.admission.tick(self.now)
        self.spent_s["tick"] += time.process_time() - began
        self.at(self.now + TICK_S, self.tick)


def measure(sessions: int, pods: int, tokens: int, turns: int) -> dict[str, float]:
    """Microseconds of CPU a turn, after a warm-up of half as many turns."""
    load = Load(sessions, pods, tokens)
    load.run(turns // 2)
    load.spent_s = dict.fromkeys(load.spent_s, 0.0)
    load.latest_us.clear()
    held, before, began_at = load.held, sum(load.turns), load.now
    load.run(turns)
    ended = sum(load.turns) - before
    figures = {f"{name}_us": round(s / ended * 1e6, 1) for name, s in load.spent_s.items()}
    decide_s = sum(load.spent_s[name] for name in ("arrive", "end", "tick"))
    return {
        "sessions": sessions,
        "pods": pods,
        "prompt_tokens": tokens,
        "turns": ended,
        "virtual_s": round(load.now - began_at, 1),
        "held_share": round((load.held - held) / ended, 3),
        **figures,
        "arrive_p99_us": round(statistics.quantiles(load.latest_us, n=100)[98], 1),
        "decide_us": round(decide_s / ended * 1e6, 1),
    }


def main(
    sessions: Annotated[int, typer.Option(min=1)] = 500,
    pods: Annotated[int, typer.Option(min=1)] = 16,
    turns: Annotated[int, typer.Option(min=100)] = 20_000,
    json: Annotated[Path, typer.Option(help="where the figures go")] = RESULTS / "admission.json",
) -> None:
    """Measure a fleet where all sessions fit, and one where half of them do."""
    fits = int(0.4 * CAPACITY_TOKENS * pods / sessions)
    rows = [measure(sessions, pods, tokens, turns) for tokens in (fits, 4 * fits)]
    json.parent.mkdir(parents=True, exist_ok=True)
    json.write_bytes(orjson.dumps({"bar_us": BAR_US, "rows": rows}, option=orjson.OPT_INDENT_2))
    table = Table(title=f"µs CPU a turn, {sessions} sessions, {pods} pods (bar: {BAR_US})")
    for name in ("prompt", "held", "arrive", "p99", "end", "tick", "together", "forecast"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            f"{row['prompt_tokens']:,}",
            f"{row['held_share']:.0%}",
            *(
                f"{row[name]:.0f}"
                for name in (
                    "arrive_us",
                    "arrive_p99_us",
                    "end_us",
                    "tick_us",
                    "decide_us",
                    "forecast_us",
                )
            ),
        )
    Console(width=100).print(table)


if __name__ == "__main__":
    typer.run(main)
