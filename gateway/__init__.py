"""CacheWise Gateway: an agent-aware gateway router for vLLM fleets."""

__version__ = "0.1.0"
