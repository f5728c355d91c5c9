"""Who is let in, as whom, and that sessions of different credentials never mix."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.access import Access, Headers, Unauthorized, new_key
from gateway.config import AccessSettings, load_settings
from gateway.errors import render

ACME, OTHER = "acme-key-0123456789", "other-key-0123456789"


def with_keys() -> Access:
    return Access(load_settings({}, None, {"CACHEWISE_API_KEYS": f"acme={ACME},o={OTHER}"}).access)


def bearer(key: str) -> list[tuple[bytes, bytes]]:
    return [(b"host", b"gw"), (b"authorization", b"Bearer " + key.encode())]


def x_api_key(key: str) -> list[tuple[bytes, bytes]]:
    return [(b"x-api-key", key.encode()), (b"host", b"gw")]


@pytest.mark.parametrize("presented", [bearer, x_api_key])
def test_a_known_key_names_its_tenant_in_either_header(presented: object) -> None:
    tenant = with_keys().authenticate(presented(ACME))  # type: ignore[operator]
    assert tenant.name == "acme"
    assert tenant != with_keys().authenticate(presented(OTHER))  # type: ignore[operator]


def test_any_key_of_a_tenant_gives_the_same_scope_in_every_process() -> None:
    env = {"CACHEWISE_API_KEYS": f"acme={ACME},acme={OTHER}"}
    one, two = (Access(load_settings({}, None, env).access) for _ in range(2))
    assert one.authenticate(bearer(ACME)) == two.authenticate(bearer(OTHER))


def test_the_scheme_is_read_in_any_case_and_other_schemes_are_no_keys() -> None:
    access = with_keys()
    assert access.authenticate([(b"authorization", b"bearer  " + ACME.encode())]).name == "acme"
    with pytest.raises(Unauthorized):
        access.authenticate([(b"authorization", b"Basic " + ACME.encode())])


def test_a_client_that_sends_a_stale_key_beside_a_known_one_is_let_in() -> None:
    headers = [*x_api_key("stale-key-of-another-server"), *bearer(ACME)]
    assert with_keys().authenticate(headers).name == "acme"


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [(b"authorization", b"")],
        [(b"authorization", b"Bearer ")],
        [(b"authorization", b"Bearer \xff\xfe")],
        [(b"x-api-key", b"")],
        bearer(ACME + "x"),
        bearer(ACME[:-1]),
        bearer("acme"),
        x_api_key("sha256:" + "0" * 64),
    ],
)
def test_without_a_known_key_nobody_is_let_in(headers: Headers) -> None:
    with pytest.raises(Unauthorized) as caught:
        with_keys().authenticate(headers)
    status, sent, body = render(caught.value, "anthropic")
    assert status == 401
    assert (b"www-authenticate", b"Bearer") in sent
    assert b"authentication_error" in body
    assert ACME[:-1] not in str(caught.value)


def test_the_stored_hash_itself_is_not_a_key() -> None:
    settings = load_settings({}, None, {"CACHEWISE_API_KEYS": f"acme={ACME}"}).access
    stored = settings.api_keys["acme"][0].get_secret_value()
    for presented in (stored, stored.removeprefix("sha256:")):
        with pytest.raises(Unauthorized):
            Access(settings).authenticate(bearer(presented))


@given(st.binary(max_size=64), st.binary(max_size=64))
def test_without_keys_scopes_are_equal_exactly_for_equal_credentials(a: bytes, b: bytes) -> None:
    access = Access(AccessSettings())
    tenants = [access.authenticate([(b"authorization", b"Bearer " + key)]) for key in (a, b)]
    assert (tenants[0] == tenants[1]) == (a.strip() == b.strip())
    assert {tenant.name for tenant in tenants} == {"default"}


def test_without_keys_the_scope_tells_nothing_about_the_credential() -> None:
    scopes = [Access(AccessSettings()).authenticate(bearer(ACME)).scope for _ in range(2)]
    assert scopes[0] == scopes[1], "a credential's sessions are the same in every replica"
    assert ACME.encode() not in scopes[0]


def test_without_keys_and_credential_everyone_is_one_anonymous() -> None:
    access = Access(AccessSettings())
    assert not access.keys_required
    assert access.authenticate([]) == access.authenticate([(b"host", b"gw")])
    assert access.authenticate([]) != access.authenticate(bearer("anonymous"))


def admin_access() -> Access:
    env = {"CACHEWISE_ACCESS__ADMIN_TOKEN": "the-token", "CACHEWISE_API_KEYS": f"acme={ACME}"}
    return Access(load_settings({}, None, env).access)


@pytest.mark.parametrize(
    "headers", [bearer("the-token"), [(b"x-cachewise-admin-token", b"the-token")]]
)
def test_the_admin_token_opens_in_either_header(headers: Headers) -> None:
    admin_access().admin(headers)


@pytest.mark.parametrize(
    "headers", [[], bearer(ACME), x_api_key("the-token"), bearer("the-toke"), bearer("the-token ,")]
)
def test_nothing_but_the_admin_token_opens(headers: Headers) -> None:
    with pytest.raises(Unauthorized):
        admin_access().admin(headers)


def test_without_an_admin_token_the_admin_pages_are_open() -> None:
    with_keys().admin([])


def test_a_new_key_is_admitted_by_its_line_and_the_line_does_not_hold_it(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    key, line = new_key("acme")
    assert key not in line
    assert new_key("acme")[0] != key
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text(line)
    access = Access(load_settings({"access": {"api_keys_file": file}}, None, {}).access)
    assert access.authenticate(bearer(key)).name == "acme"
