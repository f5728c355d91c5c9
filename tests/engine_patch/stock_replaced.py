"""pytest plugin: vLLM's own tests get the patched scheduler and queue under stock's names."""

import vllm.v1.core.block_pool
import vllm.v1.core.kv_cache_utils
import vllm.v1.core.sched.async_scheduler
import vllm.v1.core.sched.scheduler

from engine_patch.queue import ReuseAwareFreeQueue
from engine_patch.scheduler import ReuseAwareScheduler, SyncReuseAwareScheduler


class AsyncReuseAwareScheduler(ReuseAwareScheduler):
    """Asynchronous whatever the configuration says: the tests choose the class themselves."""


vllm.v1.core.kv_cache_utils.FreeKVCacheBlockQueue = ReuseAwareFreeQueue
vllm.v1.core.block_pool.FreeKVCacheBlockQueue = ReuseAwareFreeQueue
vllm.v1.core.sched.scheduler.Scheduler = SyncReuseAwareScheduler
vllm.v1.core.sched.async_scheduler.AsyncScheduler = AsyncReuseAwareScheduler
