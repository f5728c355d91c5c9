"""python -m dashboards: write the boards as JSON into the chart."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Final

from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard

from dashboards import fleet, gateway, kv, sessions

FOLDER: Final = Path(__file__).resolve().parents[1] / "k8s" / "chart" / "dashboards"
BOARDS: Final[dict[str, Callable[[], Dashboard]]] = {
    "fleet-overview": fleet.make,
    "sessions-and-tools": sessions.make,
    "kv-and-hints": kv.make,
    "gateway": gateway.make,
}


def texts() -> dict[Path, str]:
    """What each file is to hold."""
    return {
        FOLDER / f"{name}.json": json.dumps(
            make(), cls=JSONEncoder, indent=1, sort_keys=True, ensure_ascii=False
        )
        + "\n"
        for name, make in BOARDS.items()
    }


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for path, text in texts().items():
        path.write_text(text)
