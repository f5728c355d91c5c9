"""Reuse-aware KV eviction and scheduling for vLLM, installed beside vLLM in the pod.

Only `vllm_seam`, `scheduler` and `middleware` touch vLLM; the rest imports without it, so that the
embedded pod runs the very same code. Nothing here imports `gateway`.
"""
