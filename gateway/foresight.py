"""The forecast at work in a gateway: made when a session falls idle, judged and learned from when
it comes back, kept on disk."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

from gateway.config import ForecastSettings
from gateway.dialects.turn import ToolCall
from gateway.idle import IdleKind
from gateway.metrics import Metrics
from gateway.predictor import Context, Forecast, Predictor
from gateway.predictor.calibration import below, label_of
from gateway.predictor.model import MAX_CALLS
from gateway.predictor.store import Snapshot, load
from gateway.sessions import Session

logger = logging.getLogger("gateway.foresight")

DURATIONS: Final = b"x-claude-code-prev-tool-durations"
"""``Bash=14;Bash=33``: how long each tool ran, in milliseconds and in the order in which they
ended, without the time a person was asked for permission (Claude Code with
``CLAUDE_CODE_GATEWAY_HINT_HEADERS=1``)."""
MAX_DURATIONS_CHARS: Final = 4_096


class Foresight:
    """The predictor of one gateway, its calibration and its file."""

    def __init__(self, settings: ForecastSettings, metrics: Metrics) -> None:
        self.settings = settings
        self.metrics = metrics
        path = None if settings.off else settings.state_file
        self.path: Path | None = path
        self.predictor: Predictor = load(path, settings.max_nodes)
        self._saved_at_observation = self.predictor.observed_total
        self._saving = asyncio.Lock()

    def fell_idle(
        self, session: Session, calls: Sequence[ToolCall], idle_kind: IdleKind
    ) -> Forecast:
        """Forecast the gap that begins with an answer's end, as soon as it is known what the answer
        asks for."""
        session.forecast = None
        usage = session.usage
        context = Context(
            session.key,
            session.tenant,
            session.client,
            usage.prompt_tokens if usage else 0,
            session.last_failed,
        )
        session.forecast = self.predictor.forecast(calls, idle_kind, context)
        return session.forecast

    def came_back(
        self, session: Session, gap_s: float | None, headers: Mapping[bytes, bytes]
    ) -> list[float | None] | None:
        """Learn from a gap that has ended; None where it was not measured. Returns how long each of
        the calls it was spent on ran, seconds, if the client says so."""
        forecast = session.forecast
        session.forecast = None
        if forecast is None or gap_s is None:
            return None
        label = label_of(forecast)
        self.metrics.forecasts[label,].inc()
        self.metrics.tool_gaps[label,].observe(gap_s)
        for quantile in below(forecast, gap_s):
            self.metrics.forecasts_below[label, str(quantile)].inc()
        durations = headers.get(DURATIONS)
        matched = matched_durations(forecast, durations) if durations else None
        self.predictor.observe(forecast, gap_s, matched)
        return matched

    def given_up(self, session: Session, now: float) -> None:
        """Learn from a session that was not seen again for so long that it is forgotten."""
        forecast, since = session.forecast, session.idle_since
        session.forecast = None
        if forecast is not None and since is not None and forecast.idle_kind != "ended":
            self.predictor.observe(forecast, now - since, returned=False)

    async def save(self) -> None:
        """Write what was learned since the last time; the loop waits for a thread, not the disk."""
        async with self._saving:
            predictor = self.predictor
            if self.path is None or predictor.observed_total == self._saved_at_observation:
                return
            seen = predictor.observed_total
            snapshot = Snapshot(predictor)
            try:
                await asyncio.to_thread(snapshot.write, self.path)
            except OSError as error:
                self.metrics.forecast_saves.labels("failed").inc()
                logger.warning(
                    "the forecast's state cannot be kept in %s: %s", self.path, error.strerror
                )
                return
            self._saved_at_observation = seen
            self.metrics.forecast_saves.labels("ok").inc()

    @asynccontextmanager
    async def kept(self) -> AsyncIterator[None]:
        """Save at an interval while the gateway runs, and once more when it stops."""

        async def keep_saving() -> None:
            while True:
                await asyncio.sleep(self.settings.save_interval_s)
                try:
                    await self.save()
                except Exception:
                    logger.exception("saving the forecast's state failed")

        task = asyncio.create_task(keep_saving(), name="forecast saver")
        try:
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            await self.save()


def matched_durations(forecast: Forecast, header: bytes) -> list[float | None] | None:
    """How long each of the forecast's calls ran, seconds, from the client's header. Among calls of
    one tool the longest is taken for the one that was expected to be. None if nothing fits."""
    basis = forecast.basis
    if basis is None or not basis.calls:
        return None
    named: dict[str, list[float]] = {}
    for entry in header[:MAX_DURATIONS_CHARS].decode("latin-1").split(";")[: 4 * MAX_CALLS]:
        name, _, value = entry.strip().rpartition("=")
        if name and value.isascii() and value.isdecimal() and len(value) <= 10:
            named.setdefault(name, []).append(int(value) / 1000)
    found: list[float | None] = [None] * len(basis.calls)
    for name, seconds in named.items():
        places = [i for i, call in enumerate(basis.calls) if call.words.tool == name]
        if len(places) != len(seconds):
            continue
        places.sort(key=lambda i: basis.calls[i].level)
        for place, duration in zip(places, sorted(seconds), strict=True):
            found[place] = duration
    return found if any(duration is not None for duration in found) else None
