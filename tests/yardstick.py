"""CPU time on machines of any speed: what a thing costs, and what as much plain Python does."""

from __future__ import annotations

import time
from collections.abc import Callable


def cpu_s(work: Callable[[], object], times: int = 5) -> float:
    """CPU seconds of this thread that ``work`` takes, at the best of so many times."""

    def once_s() -> float:
        began_s = time.thread_time()
        work()
        return time.thread_time() - began_s

    return min(once_s() for _ in range(times))


def plain_python_s() -> float:
    """CPU seconds of summing 30,000 squares, here and now: a millisecond on a good machine."""
    return cpu_s(lambda: sum([number * number for number in range(30_000)]))
