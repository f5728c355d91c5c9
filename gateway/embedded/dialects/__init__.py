"""The wire shapes of vLLM 0.32's endpoints, one module a dialect.

An exchange reads one request body and writes its answer: as one JSON object, or as events.
"""
