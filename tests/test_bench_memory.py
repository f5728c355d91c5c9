import json
import subprocess
import sys
from pathlib import Path


def test_memory_of_a_few_sessions_is_measured_and_drawn(tmp_path: Path) -> None:
    figures, plot = tmp_path / "memory.json", tmp_path / "memory.png"
    command = [sys.executable, "-m", "bench.memory", "--sessions", "400"]
    subprocess.run(
        [*command, "--json", str(figures), "--plot", str(plot)], check=True, capture_output=True
    )
    seen = json.loads(figures.read_bytes())
    assert seen["sessions"] == 400
    assert 380_000 < seen["body_bytes"] < 420_000
    assert 0 < seen["bytes_per_session"] < 60_000
    assert plot.read_bytes().startswith(b"\x89PNG")
