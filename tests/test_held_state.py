"""Whatever happens to turns that wait, in whatever order, nothing of them is left behind."""

import asyncio
import random
import time
from typing import Any

import orjson
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from gateway.app import create_app
from gateway.config import Settings
from gateway.fleet.fleet import Fleet
from gateway.fleet.pod import Pod
from gateway.fleet.probe import Capabilities, ProbeResult
from gateway.fleet.scrape import parse_load
from gateway.relay import Dropped, Refused
from tests.crowded import CAPACITY_TOKENS, SESSION_TOKENS, agent_body

PODS = 2
CHUNK = b'data: {"id":"1","choices":[{"index":0,"delta":{}}]}\n\n'


class FakeAnswer:
    """A pod's answer that ends as the test says."""

    status = 200
    event_stream = True
    body = b""

    def __init__(self, ended: asyncio.Future[str]) -> None:
        self.ended = ended

    async def pass_on(self, send: Any, _: Any, observe: Any, __: Any, begun: bool) -> None:
        if not begun:
            await send({"type": "http.response.start", "status": 200, "headers": []})
        await self.ended
        usage = b'{"usage":{"prompt_tokens":%d,"completion_tokens":4}}' % SESSION_TOKENS
        finish = CHUNK.replace(b"{}}", b'{},"finish_reason":"stop"}')
        for chunk in (finish, b"data: %b\n\n" % usage):
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
            observe(chunk)

    def close(self) -> None:
        return


class Client:
    """One turn through the gateway's ASGI app, without sockets."""

    def __init__(self, app: Any, name: str, headers: dict[str, str], stream: bool) -> None:
        body = orjson.dumps(agent_body("chat", name, stream=stream))
        self.sent: list[dict[str, Any]] = []
        self.leaves = asyncio.Event()
        self._request = [{"type": "http.request", "body": body, "more_body": False}]
        named = {"x-cachewise-session-id": name, **headers}
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/chat/completions",
            "query_string": b"",
            "headers": [(k.encode(), v.encode()) for k, v in named.items()],
        }
        self.task = asyncio.ensure_future(app(scope, self._receive, self._send))

    async def _receive(self) -> dict[str, Any]:
        if self._request:
            return self._request.pop()
        await self.leaves.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict[str, Any]) -> None:
        self.sent.append(message)

    @property
    def ended_well(self) -> bool:
        """Whether the response is whole."""
        starts = [m for m in self.sent if m["type"] == "http.response.start"]
        return len(starts) <= 1


class Crowd(RuleBasedStateMachine):
    """Turns of a few sessions on two small pods: they come, go, fail; pods die and come back."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        pods: Any = [{"url": f"http://127.0.0.1:{9 + n}", "name": f"pod-{n}"} for n in range(PODS)]
        options: Any = {"heartbeat_s": 0.004, "max_held": 4}
        self.app = create_app(Settings(pods=pods, admission=options))
        self.gateway = self.app.gateway
        self.clients: list[Client] = []
        self.running: list[tuple[Pod, asyncio.Future[str]]] = []
        self.refusing: set[str] = set()
        self.gateway.relay.open = self._open  # type: ignore[method-assign]
        for pod in self.gateway.fleet:
            self._probe(pod)

    def _probe(self, pod: Pod) -> None:
        blocks = CAPACITY_TOKENS // 16
        load = parse_load(
            f'vllm:cache_config_info{{block_size="16",num_gpu_blocks="{blocks}"}} 1\n'
        )
        pod.models = {"m": None}
        result = ProbeResult(ready=True, models=(), capabilities=Capabilities(), load=load)
        fleet: Fleet = self.gateway.fleet
        fleet.apply(pod, result)
        pod.models = {"m": None}

    async def _open(self, pod: Pod, *_: Any) -> Any:
        if pod.name in self.refusing:
            raise Refused("refused", "refused")
        ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.running.append((pod, ended))
        return FakeAnswer(ended)

    def step(self, seconds: float = 0.0) -> None:
        async def pause() -> None:
            for _ in range(8):
                await asyncio.sleep(0)
            if seconds:
                await asyncio.sleep(seconds)

        self.runner.run(pause())

    def _do(self, action: Any) -> None:
        async def act() -> None:
            action()

        self.runner.run(act())
        self.step()

    @rule(
        name=st.sampled_from("abcde"),
        stream=st.booleans(),
        final=st.booleans(),
        priority=st.sampled_from(["interactive", "batch"]),
    )
    def arrives(self, name: str, stream: bool, final: bool, priority: str) -> None:
        headers = {"x-cachewise-priority": priority}
        if final:
            headers["x-cachewise-session-final"] = "true"
        self._do(lambda: self.clients.append(Client(self.app, name, headers, stream)))

    @precondition(lambda self: self.running)
    @rule(which=st.randoms(use_true_random=False))
    def is_answered(self, which: random.Random) -> None:
        _, ended = self.running.pop(which.randrange(len(self.running)))
        self._do(lambda: ended.done() or ended.set_result("ok"))

    @precondition(lambda self: self.running)
    @rule(which=st.randoms(use_true_random=False))
    def breaks_off(self, which: random.Random) -> None:
        _, ended = self.running.pop(which.randrange(len(self.running)))
        error = which.choice([Dropped("disconnected", "x"), RuntimeError("x")])
        self._do(lambda: ended.done() or ended.set_exception(error))

    @precondition(lambda self: self.clients)
    @rule(which=st.randoms(use_true_random=False))
    def leaves(self, which: random.Random) -> None:
        client = which.choice(self.clients)
        self._do(client.leaves.set)
        self.step(0.025)  # the watch for departures begins after 0.02 s

    @precondition(lambda self: self.clients)
    @rule(which=st.randoms(use_true_random=False))
    def is_cancelled(self, which: random.Random) -> None:
        client = which.choice(self.clients)
        self._do(client.task.cancel)

    @rule(number=st.integers(0, PODS - 1))
    def pod_dies(self, number: int) -> None:
        pod = self.gateway.fleet.pods[f"pod-{number}"]
        self.refusing.add(pod.name)
        self._do(lambda: self.gateway.fleet.lost(pod, "test"))

    @rule(number=st.integers(0, PODS - 1))
    def pod_comes_back(self, number: int) -> None:
        pod = self.gateway.fleet.pods[f"pod-{number}"]
        self.refusing.discard(pod.name)
        self._do(lambda: self._probe(pod))

    @rule(number=st.integers(0, PODS - 1), draining=st.booleans())
    def pod_drains(self, number: int, draining: bool) -> None:
        pod = self.gateway.fleet.pods[f"pod-{number}"]
        self._do(lambda: self.gateway.fleet.drain(pod, draining))

    @rule(seconds=st.sampled_from([0.0, 1.0, 30.0, 100.0]))
    def time_passes(self, seconds: float) -> None:
        self._do(lambda: self.gateway.loop.tick(time.monotonic() + seconds))
        self.step(0.01)

    @invariant()
    def books_balance(self) -> None:
        admission = self.gateway.loop.admission
        assert admission.held_count <= 4
        open_turns = [c for c in self.clients if not c.task.done()]
        assert admission.held_count <= len(open_turns)
        assert len(self.gateway.loop.waiting) == admission.held_count
        placed = 0
        for book in admission.books.values():
            for lane in ("agent", "aside"):
                own = sum(p.own_tokens for p in book.places.values() if p.ask.lane == lane)
                links = dict(
                    link for p in book.places.values() if p.ask.lane == lane for link in p.links
                )
                assert book._tokens[lane] == own + sum(links.values())  # type: ignore[index]
            placed += sum(p.running for p in book.places.values())
        assert placed <= len(open_turns)

    def teardown(self) -> None:
        for client in self.clients:
            self._do(client.leaves.set)
        self.step(0.03)
        for client in self.clients:
            assert client.task.done(), "a turn goes on without its client"
            assert client.ended_well
        gateway = self.gateway
        assert all(p.in_flight == 0 == p.queued_prefill_tokens for p in gateway.fleet)
        assert all(s.in_flight == 0 for s in gateway.sessions)
        admission = gateway.loop.admission
        assert admission.held_count == 0
        assert not gateway.loop.waiting
        for book in admission.books.values():
            assert book.claim is None
            assert book.aside_tokens == 0
            assert not any(place.running for place in book.places.values())
        for session in list(gateway.sessions):
            gateway.sessions._forget(session)
        assert not any(book.places or book.tokens for book in admission.books.values())
        assert not any(book._links for book in admission.books.values())
        self.runner.close()


TestCrowd = Crowd.TestCase
TestCrowd.settings = settings(
    max_examples=40,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
