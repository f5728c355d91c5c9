"""Reuse-aware KV eviction and scheduling for vLLM, installed beside vLLM in the pod.

`queue`, `forecast`, `sessions` and `order` import without vLLM; only `vllm_seam`, `scheduler` and
`middleware` touch it. Nothing here imports `gateway`.
"""
