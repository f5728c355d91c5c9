"""``/v1/messages/count_tokens``: passed to any pod with the model; no turn, no session."""

from __future__ import annotations

from gateway.dialects import MalformedRequestError, read_model, without_hints
from gateway.errors import Dialect as Family
from gateway.errors import GatewayError
from gateway.gateway import Gateway
from gateway.relay import BrokenOffError, ClientGoneError, Departure, PodError, Refused, TimedOut
from gateway.request import (
    Receive,
    Scope,
    Send,
    authenticate,
    map_model,
    no_answer,
    request_body,
    send_error,
)


class CountTokensEndpoint:
    """The ASGI endpoint."""

    def __init__(self, gateway: Gateway, path: str, family: Family) -> None:
        self.gateway = gateway
        self.path = path
        self.family = family

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gateway = self.gateway
        try:
            tenant = authenticate(gateway, scope)
            body = await request_body(gateway, scope, receive)
            try:
                model, _ = read_model(body)
                if tenant.name not in gateway.trusted:
                    body = without_hints(body)
            except MalformedRequestError as error:
                raise GatewayError(400, "invalid_request", str(error)) from None
            served = gateway.served_model(model)
            if served != model:
                body = map_model(body, model, served)
            async with Departure(receive):
                await self._relay(served, scope, body, send)
        except GatewayError as error:
            await send_error(gateway, error, self.family, send)
        except (ClientGoneError, BrokenOffError):
            return

    async def _relay(self, model: str, scope: Scope, body: bytes, send: Send) -> None:
        gateway = self.gateway
        pods = sorted(gateway.fleet.able(model), key=lambda pod: pod.in_flight)
        last: PodError | None = None
        for pod in [*pods[:1], *pods]:  # a kept connection may have been closed for age
            if not pod.ready:
                continue
            headers = gateway.relay.headers_for(pod, scope["headers"], None)
            query = scope["query_string"].decode("latin-1")
            try:
                answer = await gateway.relay.open(pod, "POST", self.path, query, headers, body)
            except PodError as error:
                last = error
                if isinstance(error, TimedOut):
                    break
                if isinstance(error, Refused):
                    gateway.fleet.lost(pod, str(error))
                continue
            try:
                await answer.pass_on(send)
            finally:
                answer.close()
            return
        raise no_answer(model, last)
