"""Following a pod's KV events over real ZeroMQ: what is missed, what comes back, what does not."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.embedded.kv_events import KvEvents
from gateway.fleet.kv_events import Subscription
from gateway.fleet.ledger import Ledger
from tests.kv_publisher import BLOCK_TOKENS, CLEARED, Publisher, removed, stored
from tests.served import Pod, gateway_over, until


class Follower:
    """A subscription and what came of it."""

    def __init__(self, publisher: Publisher | KvEvents) -> None:
        self.ledger = Ledger()
        self.troubles: Counter[str] = Counter()

        def count(trouble: str) -> None:
            self.troubles[trouble] += 1

        self.subscription = Subscription(
            "pod", publisher.endpoint, publisher.replay_endpoint, self.ledger, count
        )

    def blocks(self, sid: str) -> int | None:
        tokens = self.ledger.tokens(sid)
        return None if tokens is None else tokens // BLOCK_TOKENS

    async def shows(self, sid: str, blocks: int | None) -> None:
        await until(lambda: self.blocks(sid) == blocks, 10)


@asynccontextmanager
async def following(publisher: Publisher) -> AsyncIterator[Follower]:
    follower = Follower(publisher)
    task = asyncio.create_task(follower.subscription.run())
    try:
        await publisher.subscribed()
        await until(lambda: follower.ledger.live, 10)
        yield follower
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert not follower.ledger.live


async def test_it_knows_what_a_session_has_in_the_cache() -> None:
    async with Publisher() as pod, following(pod) as follower:
        await pod.send(stored("s", None, 1, 2, 3), stored("t", 2, 13))
        await follower.shows("s", 3)
        await follower.shows("t", 3)
        await pod.send(removed(3), removed(13))
        await follower.shows("s", 2)
        await pod.send(CLEARED, stored("u", None, 7))
        await follower.shows("u", 1)
        assert follower.blocks("s") == 0
        assert follower.troubles == {}


async def test_hashes_of_bytes_are_as_good_as_numbers() -> None:
    async with Publisher() as pod, following(pod) as follower:
        one, two = b"\1" * 32, b"\2" * 32
        await pod.send(stored("s", None, one), stored("s", one, two))
        await follower.shows("s", 2)
        await pod.send(removed(two))
        await follower.shows("s", 1)


async def test_only_whole_prefixes_on_the_accelerator_count() -> None:
    sliding = {"group_idx": 1, "kv_cache_spec_kind": "sliding_window"}
    async with Publisher() as pod, following(pod) as follower:
        await pod.send(
            stored("s", None, 1, 2),
            stored("s", None, 1, 2, 3, 4, 5, **sliding),
            stored("s", 2, 3, medium="CPU"),
            {"type": "SomethingNew", "what": 5},
        )
        await follower.shows("s", 2)
        await pod.send(removed(2, group_idx=1), removed(2, medium="CPU"), stored("t", None, 9))
        await follower.shows("t", 1)
        assert follower.blocks("s") == 2


async def test_one_that_comes_late_is_told_all_from_the_beginning() -> None:
    async with Publisher() as pod:
        await pod.send(stored("s", None, 1, 2))
        await pod.send(removed(2))
        async with following(pod) as follower:
            await follower.shows("s", 1)
            assert pod.asked == [0]
            await pod.send(stored("s", 1, 2, 3))
            await follower.shows("s", 3)


@pytest.mark.parametrize("missed", [1, 30])
async def test_what_was_missed_is_replayed(missed: int) -> None:
    async with Publisher() as pod, following(pod) as follower:
        await pod.send(stored("s", None, 1))
        await follower.shows("s", 1)
        for n in range(1, missed + 1):
            await pod.send(stored("s", n, n + 1), lost=True)
        await pod.send(stored("t", None, 99))
        await follower.shows("s", missed + 1)
        await follower.shows("t", 1)
        assert pod.asked == [0, 0]
        assert set(follower.troubles) == {"replayed"}
        assert follower.troubles["replayed"] >= missed


async def test_a_long_replay_is_had_in_the_end() -> None:
    """Longer than the queues between: parts of it are lost on the way."""
    count = 6_000
    async with Publisher() as pod:
        await pod.send(stored("s", None, 1))
        for n in range(1, count):
            await pod.send(stored("s", n, n + 1), lost=True)
        async with following(pod) as follower:
            await follower.shows("s", count)
            assert follower.troubles["lost"] == 0


@pytest.mark.parametrize("kept", [None, 2], ids=["no replay endpoint", "too late"])
async def test_what_cannot_be_had_any_more_is_not_known(kept: int | None) -> None:
    pod = Publisher(replays=kept is not None, buffer_steps=kept or 10)
    async with pod, following(pod) as follower:
        await pod.send(stored("s", None, 1, 2))
        await follower.shows("s", 2)
        for _ in range(5):
            await pod.send(removed(2), lost=True)
        await pod.send(stored("t", None, 9))
        await follower.shows("t", 1)
        assert follower.blocks("s") is None
        assert follower.troubles["lost"] == 1
        # What came before is not known; what begins anew is.
        await pod.send(stored("s", 2, 3))
        await pod.send(stored("u", None, 1, 2, 3))
        await follower.shows("u", 3)
        assert follower.blocks("s") is None


@pytest.mark.parametrize("replays", [True, False])
@pytest.mark.parametrize("further", [False, True], ids=["fewer messages", "more messages"])
async def test_an_engine_that_starts_anew_has_an_empty_cache(replays: bool, further: bool) -> None:
    async with Publisher(replays=replays) as pod:
        await pod.send(stored("old", None, 1, 2))
        async with following(pod) as follower:
            for _ in range(3):
                await pod.send(stored("s", None, 11))
            await follower.shows("s", 1)
            await pod.__aexit__(None, None, None)
            await follower.shows("s", None)
            again = Publisher(pod.port, pod.replay_port, replays=replays)
            async with again:
                for _ in range(9 if further else 1):
                    await again.send(stored("new", None, 21, 22), lost=True)
                await again.subscribed()
                await until(lambda: follower.ledger.live, 10)
                await again.send(stored("after", None, 31))
                await follower.shows("after", 1)
                assert follower.blocks("s") == (0 if replays else None)
                assert follower.blocks("new") == (2 if replays else None)
                if replays:
                    assert follower.troubles["restarted"] == 1
            await pod.__aenter__()


async def test_a_connection_that_breaks_loses_nothing_if_the_engine_is_the_same() -> None:
    async with Publisher() as pod, following(pod) as follower:
        await pod.send(stored("s", None, 1, 2))
        await follower.shows("s", 2)
        pod.unbind()
        for monitor_break in range(2):
            await pod.send(stored("s", 2 + monitor_break, 3 + monitor_break), lost=True)
        await follower.shows("s", None)
        pod.bind()
        await follower.shows("s", 4)
        assert follower.troubles["restarted"] == follower.troubles["lost"] == 0


async def test_numbers_that_begin_again_on_one_connection_are_another_engines() -> None:
    async with Publisher() as pod, following(pod) as follower:
        for _ in range(5):
            await pod.send(stored("s", None, 1))
        await follower.shows("s", 1)
        pod.next = 0
        pod.buffer.clear()
        await pod.send(stored("t", None, 2))
        await follower.shows("t", 1)
        assert follower.blocks("s") == 0
        assert follower.troubles["restarted"] == 1


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc1",
        b"\x93\x01\x02",
        msgspec.msgpack.encode({"a": 1}),
        msgspec.msgpack.encode([1.0, [{"type": "BlockStored", "block_hashes": "x"}], 0]),
        msgspec.msgpack.encode([1.0, [{"type": "BlockRemoved", "block_hashes": [1.5]}], 0]),
        msgspec.msgpack.encode([1.0, [[1, 2]], 0]),
    ],
)
async def test_a_payload_that_cannot_be_read_leaves_nothing_known(payload: bytes) -> None:
    async with Publisher() as pod, following(pod) as follower:
        await pod.send(stored("s", None, 1))
        await follower.shows("s", 1)
        await pod.send_payload(payload)
        await follower.shows("s", None)
        assert follower.troubles["malformed"] == 1
        await pod.send(stored("t", None, 2))
        await follower.shows("t", 1)


async def test_a_message_of_another_shape_leaves_nothing_known() -> None:
    async with Publisher() as pod, following(pod) as follower:
        await pod.send(stored("s", None, 1))
        await follower.shows("s", 1)
        await pod.send_frames(b"", b"123", b"456", b"789")
        await follower.shows("s", None)
        await pod.send(stored("t", None, 2))
        await follower.shows("t", 1)


@given(
    st.lists(
        st.one_of(
            st.builds(
                stored,
                st.sampled_from(["s", "t", None]),
                st.none() | st.integers(0, 9),
                *[st.integers(0, 9)] * 2,
            ),
            st.builds(removed, st.integers(0, 9)),
            st.just(CLEARED),
            st.fixed_dictionaries(
                {"type": st.text(max_size=5)},
                optional={
                    "block_hashes": st.lists(st.integers(0, 9), max_size=3),
                    "block_size": st.integers(-5, 50),
                },
            ),
        ),
        max_size=20,
    )
)
def test_no_sequence_of_events_breaks_it(events: list[dict[str, Any]]) -> None:
    ledger = Ledger()
    ledger.live = True
    subscription = Subscription("pod", "tcp://x:1", None, ledger, lambda trouble: None)
    subscription._apply(0, msgspec.msgpack.encode([1.0, events, 0]))
    for sid in ("s", "t"):
        tokens = ledger.tokens(sid)
        assert tokens is None or tokens >= 0


async def test_the_fleet_follows_its_pods_and_goes_by_belief_when_they_fall_silent() -> None:
    async with Publisher() as events, Pod() as served:
        pods = [
            {
                "url": served.url,
                "name": "a",
                "kv_events": events.endpoint,
                "kv_events_replay": events.replay_endpoint,
            }
        ]
        async with gateway_over(pods=pods) as gateway:
            (pod,) = gateway.gateway.fleet
            ledger = pod.residency.ledger
            assert ledger is not None
            await events.subscribed()
            await until(lambda: ledger.live)
            pod.residency.touch("s", 5_000, [])
            await events.send(stored("s", None, 1, 2))
            await until(lambda: pod.residency.tokens("s") == 2 * BLOCK_TOKENS)
            assert await gateway.metric('cachewise_pod_kv_events_live{pod="a"}') == 1
            assert await gateway.metric('cachewise_pod_resident_tokens{pod="a"}') == 32
            malformed = 'cachewise_pod_kv_events_troubles_total{pod="a",trouble="malformed"}'
            assert f"{malformed} 0.0" in (await gateway.get("/metrics")).text
            await events.send_payload(b"nonsense")
            await until(lambda: pod.residency.tokens("s") == 5_000)
            assert await gateway.metric(malformed) == 1
            await events.send(stored("s", None, 1))
            await until(lambda: pod.residency.tokens("s") == BLOCK_TOKENS)
            await events.__aexit__(None, None, None)
            await until(lambda: pod.residency.tokens("s") == 5_000)
            assert await gateway.metric('cachewise_pod_kv_events_live{pod="a"}') == 0
            gateway.gateway.fleet._remove(pod)
            assert pod.residency.ledger is None
            assert not gateway.gateway.fleet._followers
            await events.__aenter__()


def test_each_rank_publishes_at_a_port_of_its_own() -> None:
    from gateway.config import PodSettings, ProbeSettings
    from gateway.fleet.discovery import Found
    from gateway.fleet.fleet import Fleet

    fleet = Fleet(
        [
            PodSettings(
                url="http://a:8000",
                dp_ranks=2,
                kv_events="tcp://a:5557",
                kv_events_replay="tcp://a:6557",
            ),
            PodSettings(url="http://b:8000"),
        ],
        ProbeSettings(),
        ranks=2,
        events_ports=(5557, None),
    )
    fleet.reconcile([Found("c", "http://10.0.0.7:8000"), Found("d", "http://[::1]:8000")])
    assert {pod.name: pod.kv_events for pod in fleet} == {
        "a:8000/0": ("tcp://a:5557", "tcp://a:6557"),
        "a:8000/1": ("tcp://a:5558", "tcp://a:6558"),
        "b:8000": None,
        "c/0": ("tcp://10.0.0.7:5557", None),
        "c/1": ("tcp://10.0.0.7:5558", None),
        "d/0": ("tcp://[::1]:5557", None),
        "d/1": ("tcp://[::1]:5558", None),
    }
