from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.sharing.redis_server import RedisServer, required


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    """A Redis that runs."""
    required()
    server = RedisServer(tmp_path)
    server.start()
    try:
        yield server
    finally:
        server.kill()
