"""Make `sample.jsonl`: made-up sessions whose gaps, lengths and contexts are spread like those of
real coding agents, for a demo without any data.

    python -m bench.replay.sample

The figures it imitates (Claude Code sessions of callanjfox/kv-cache-tester, Apache-2.0): gaps after
a tool call p50 1.2 s, p75 7 s, p90 62 s; after an answer p50 about 100 s; 2.6 % of a prompt is new.
"""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

SAMPLE = Path(__file__).with_name("sample.jsonl")
SESSIONS = 32


def main() -> None:
    """Write the sample."""
    rng = random.Random(5)
    lines = []
    for session in range(SESSIONS):
        context = int(rng.uniform(18_000, 70_000))
        for _ in range(rng.randint(12, 32)):
            out = int(min(4_000, rng.lognormvariate(math.log(250), 1.0))) + 1
            human = rng.random() < 0.08
            gap_s = rng.lognormvariate(math.log(100.0 if human else 1.2), 1.0 if human else 2.2)
            lines.append(
                json.dumps(
                    {
                        "session": f"made-up-{session:02}",
                        "ctx": context,
                        "out": out,
                        "gap_s": round(min(gap_s, 280.0), 2),
                        "gap_kind": "user" if human else "tool",
                    },
                    separators=(",", ":"),
                )
            )
            context = min(context + out + int(rng.expovariate(1 / 1_500)), 118_000)
    SAMPLE.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
