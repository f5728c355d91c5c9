"""What the predictor knows, on disk: one compact file, replaced as a whole.

Kept are the nodes that are of nobody in particular or of a tenant, never those of a session: their
words (see `gateway.predictor.shell.safe_word`), statistics and histograms. The file that ships with
the package (`PRIORS`) is of the same form and holds the trained correction too.
"""

from __future__ import annotations

import io
import logging
import os
import time
import zipfile
from pathlib import Path
from typing import Any, Final

import numpy as np
import orjson

from gateway.predictor.correction import Correction
from gateway.predictor.grid import BINS, EDGES_S
from gateway.predictor.model import MAX_NODES, SHARED_MEMORY, Overhead, Predictor, Returns
from gateway.predictor.table import STATS, UNIT, N
from gateway.predictor.warp import BINS as WARP_BINS
from gateway.predictor.warp import Warp

logger = logging.getLogger("gateway.predictor")

FORMAT: Final = 1
PRIORS: Final = Path(__file__).with_name("priors.npz")
MAX_FILE_BYTES: Final = 256 * 1024 * 1024
_MAX_WORD_CHARS: Final = 64


class StateError(ValueError):
    """A file that cannot be used; the text says why."""


class NewerStateError(StateError):
    """A file written by a later version."""


class Snapshot:
    """A copy of what is kept, taken in the event loop in a few milliseconds, written elsewhere."""

    def __init__(self, predictor: Predictor, with_correction: bool = False) -> None:
        kept = [(key, row) for key, row in predictor.table if isinstance(key, tuple)]
        rows = [row for _, row in kept]
        self.keys = [key for key, _ in kept]
        predictor.table.normalise(rows)
        data = predictor.table.data.take(rows, axis=0)
        self.stats, self.counts = data[:, :STATS], data[:, STATS:]
        self.warps = {kind: list(warp.counts) for kind, warp in predictor.warps.items()}
        self.returns = {"\t".join(k): (r.returned, r.gone) for k, r in predictor.returns.items()}
        self.overheads = {name: (o.log_s, o.seen) for name, o in predictor.overheads.items()}
        self.observed_total = predictor.observed_total
        self.correction = predictor.correction if with_correction else None

    def dump(self) -> bytes:
        header = {
            "format": FORMAT,
            "edges_s": list(EDGES_S),
            "observed_total": self.observed_total,
            "returns": self.returns,
            "overheads": self.overheads,
            "warps": self.warps,
            "keys": self.keys,
        }
        arrays: dict[str, Any] = {
            "header": np.frombuffer(orjson.dumps(header), np.uint8),
            "stats": self.stats,
            "counts": self.counts.astype(np.float16),
        }
        if self.correction is not None:
            arrays["columns"] = self.correction.columns
            arrays["borders"] = self.correction.borders
            arrays["leaves"] = self.correction.leaves
            arrays["bias"] = self.correction.bias
        out = io.BytesIO()
        save = np.savez_compressed if self.correction is not None else np.savez
        save(out, **arrays)
        return out.getvalue()

    def write(self, path: Path) -> None:
        """Replace the file in one step. Raises `OSError`."""
        data = self.dump()
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            with open(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)


def read(path: Path, max_nodes: int = MAX_NODES) -> Predictor:
    """The predictor a file holds. Raises `FileNotFoundError`, `OSError` and `StateError`."""
    if path.stat().st_size > MAX_FILE_BYTES:
        raise StateError("it is far larger than any state")
    return parse(path.read_bytes(), max_nodes)


def parse(data: bytes, max_nodes: int = MAX_NODES) -> Predictor:
    """The predictor that a snapshot's bytes hold. Raises `StateError`."""
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            header = orjson.loads(arrays["header"].tobytes())
            version = header["format"]
            if version > FORMAT:
                raise NewerStateError(f"it is of format {version}; this version reads {FORMAT}")
            return built(header, dict(arrays), max_nodes)
    except StateError:
        raise
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        IndexError,
        EOFError,
        OSError,
        OverflowError,
        MemoryError,
        NotImplementedError,
        RuntimeError,
        zipfile.BadZipFile,
    ) as error:
        raise StateError(f"it cannot be read ({type(error).__name__})") from None
    except Exception as error:  # zlib.error, struct.error …: whatever a damaged file makes of it
        raise StateError(f"it is damaged ({type(error).__name__})") from None


def built(header: dict[str, Any], arrays: dict[str, Any], max_nodes: int = MAX_NODES) -> Predictor:
    """A predictor of a file's parts. Raises `StateError` and what wrong types raise."""
    if not np.allclose(header["edges_s"], EDGES_S):
        raise StateError("its grid of times is another")
    keys = [tuple(key) for key in header["keys"]]
    stats = np.array(arrays["stats"], np.float32)
    counts = np.asarray(arrays["counts"], np.float32)
    if stats.shape != (len(keys), STATS) or counts.shape != (len(keys), BINS):
        raise StateError("its parts do not fit together")
    if not (np.isfinite(stats).all() and np.isfinite(counts).all() and (counts >= 0).all()):
        raise StateError("it holds numbers that cannot be")
    for key in keys:
        for word in key:
            if not isinstance(word, str) or len(word) > _MAX_WORD_CHARS:
                raise StateError("it holds a name that cannot be")
    stats[:, UNIT] = 1.0
    predictor = Predictor()
    predictor.table.max_nodes = max_nodes
    predictor.table.fill(keys[-max_nodes:], stats[-max_nodes:], counts[-max_nodes:])
    for name, (returned, gone) in header["returns"].items():
        idle_kind, _, kind = name.partition("\t")
        predictor.returns[idle_kind, kind] = Returns(float(returned), float(gone))
    for name, (log_seconds, seen) in header["overheads"].items():
        predictor.overheads[str(name)] = Overhead(float(log_seconds), int(seen))
    for kind, warp_counts in header["warps"].items():
        if len(warp_counts) != WARP_BINS or not all(0 <= float(c) < 1e9 for c in warp_counts):
            raise StateError("its calibration does not fit")
        predictor.warps[str(kind)] = Warp([float(count) for count in warp_counts])
    predictor.observed_total = int(header["observed_total"])
    if "columns" in arrays:
        predictor.correction = Correction(
            arrays["columns"], arrays["borders"], arrays["leaves"], arrays["bias"]
        )
    return predictor


def priors(max_nodes: int = MAX_NODES) -> Predictor:
    """What a fresh install knows."""
    predictor = read(PRIORS, max_nodes)
    predictor.observed_total = 0
    return predictor


def load(path: Path | None, max_nodes: int = MAX_NODES) -> Predictor:
    """The state of an earlier run over the shipped priors; the priors alone where there is none.
    A file that cannot be used is set aside and reported; never raises for what a file holds."""
    base = priors(max_nodes)
    if path is None:
        return base
    try:
        found = read(path, max_nodes)
    except FileNotFoundError:
        return base
    except StateError as error:
        kind = "newer" if isinstance(error, NewerStateError) else "corrupt"
        aside = path.with_name(f"{path.name}.{kind}-{int(time.time())}")
        try:
            path.replace(aside)
        except OSError as why:
            logger.warning(
                "the forecast's state %s is not used: %s; it cannot be set aside: %s",
                path,
                error,
                why.strerror,
            )
        else:
            logger.warning(
                "the forecast's state %s is not used: %s; it was set aside as %s, learning starts"
                " from the priors",
                path,
                error,
                aside.name,
            )
        return base
    except OSError as error:
        logger.warning("the forecast's state %s cannot be read: %s", path, error.strerror)
        return base
    found.correction = base.correction
    return found


def merge(into: Predictor, other: Predictor) -> int:
    """Add what another gateway has learned: sums and histograms add up.
    Returns how many nodes came."""
    came = 0
    for key, row in list(other.table):
        if not isinstance(key, tuple):
            continue
        to = into.table.touch(key)
        into.table.normalise(to)
        other.table.normalise(row)
        mine, its = into.table.data[to], other.table.data[row]
        if its[N] > mine[N]:
            mine[:N] = its[:N]
        mine[N:] += its[N:]
        if mine[N] > SHARED_MEMORY:
            mine[N:] *= SHARED_MEMORY / mine[N]
        came += 1
    for place, returns in other.returns.items():
        known = into.returns.setdefault(place, Returns())
        known.returned += returns.returned
        known.gone += returns.gone
    for kind, warp in other.warps.items():
        ours = into.warps[kind]
        ours.counts = [a + b for a, b in zip(ours.counts, warp.counts, strict=True)]
        ours.refresh()
    for client, overhead in other.overheads.items():
        into.overheads.setdefault(client, overhead)
    into.observed_total += other.observed_total
    return came
