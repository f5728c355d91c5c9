"""An embedded pod: a vLLM stand-in with real block-level KV accounting."""
