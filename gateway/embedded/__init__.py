"""An embedded pod: a vLLM stand-in with real block-level KV accounting."""

from gateway.embedded.app import create_pod_app
from gateway.embedded.engine import EmbeddedEngine
from gateway.embedded.fleet import EmbeddedFleet
from gateway.embedded.scheduler import EngineConfig

__all__ = ["EmbeddedEngine", "EmbeddedFleet", "EngineConfig", "create_pod_app"]
