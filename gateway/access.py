"""Who is asking: API keys, the tenants they name, and the admin token.

Keys are kept as SHA-256 digests (`gateway.config.hash_key` says why a fast hash is right) and a
presented key is hashed once, looked up by digest, then compared in constant time.
"""

import hashlib
import hmac
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, TypeAlias

from gateway.config import KEY_PREFIX, AccessSettings, hash_key
from gateway.errors import GatewayError

Headers: TypeAlias = Iterable[tuple[bytes, bytes]]

ADMIN_HEADER: Final = b"x-cachewise-admin-token"


class Unauthorized(GatewayError):  # noqa: N818 (what HTTP calls it)
    """No credential, or one that is not known."""

    def __init__(self, message: str) -> None:
        super().__init__(401, "invalid_api_key", message)


@dataclass(frozen=True, slots=True)
class Tenant:
    """Whom a request belongs to.

    `name` is for logs and labels: as configured, `default` when no keys are. `scope` is opaque and
    keeps sessions apart: equal for equal tenants, or for equal credentials when no keys are
    configured; it lets no one recover the credential.
    """

    name: str
    scope: bytes


#: Fixed, so that a credential's sessions are the same in every replica and after a restart.
_SCOPE_SALT: Final = b"cachewise session scope\0"
_ANONYMOUS: Final = Tenant("default", b"anonymous")


class Access:
    """Reads credentials from raw ASGI headers (names in lower case)."""

    def __init__(self, settings: AccessSettings) -> None:
        self._tenants: dict[bytes, tuple[bytes, Tenant]] = {}
        for name, stored_keys in settings.api_keys.items():
            tenant = Tenant(name, b"tenant:" + name.encode())
            for stored in stored_keys:
                digest = bytes.fromhex(stored.get_secret_value().removeprefix("sha256:"))
                self._tenants[digest] = (digest, tenant)
        token = settings.admin_token
        self._admin = None if token is None else _digest(token.get_secret_value().encode())

    @property
    def keys_required(self) -> bool:
        return bool(self._tenants)

    def authenticate(self, headers: Headers) -> Tenant:
        """The tenant of `x-api-key` or `Authorization: Bearer`. Clients that hold both send the
        same person's; any known one will do.

        Raises `Unauthorized` if keys are configured and none is presented that is known.
        """
        presented = list(_credentials(headers, b"x-api-key"))
        if not self._tenants:
            if not presented:
                return _ANONYMOUS
            return Tenant("default", _digest(_SCOPE_SALT + presented[0])[:16])
        for key in presented:
            digest = _digest(key)
            known = self._tenants.get(digest)
            if known is not None and hmac.compare_digest(known[0], digest):
                return known[1]
        if presented:
            raise Unauthorized("The API key is not known to this gateway.")
        raise Unauthorized(
            "This gateway asks for an API key, as 'Authorization: Bearer KEY' or 'x-api-key: KEY'."
        )

    def admin(self, headers: Headers) -> None:
        """Lets pass whoever presents the admin token, as `Authorization: Bearer` or
        `x-cachewise-admin-token`; everyone, if none is set. Raises `Unauthorized`.
        """
        if self._admin is None:
            return
        for token in _credentials(headers, ADMIN_HEADER):
            if hmac.compare_digest(self._admin, _digest(token)):
                return
        raise Unauthorized(
            "This address asks for the admin token, as 'Authorization: Bearer TOKEN' or"
            f" '{ADMIN_HEADER.decode()}: TOKEN'."
        )


def new_key(tenant: str) -> tuple[str, str]:
    """A new random key (256 bits) and the line for `access.api_keys_file` that admits it."""
    key = KEY_PREFIX + secrets.token_urlsafe(32)
    return key, f"{tenant}: {hash_key(key)}"


def _digest(value: bytes) -> bytes:
    return hashlib.sha256(value).digest()


def _credentials(headers: Headers, own_header: bytes) -> Iterable[bytes]:
    for name, value in headers:
        if name == b"authorization":
            scheme, _, credential = value.partition(b" ")
            if scheme.lower() == b"bearer" and (credential := credential.strip()):
                yield credential
        elif name == own_header and value:
            yield value
