"""Memory of many sessions: `python -m bench.memory`."""
