from collections.abc import Iterator

import pytest

from tests.engine import pods, tiny_model


@pytest.fixture(scope="package")
def vllm_pods(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[pods.VllmPod]]:
    """Two real vLLM servers of one tiny model, for all tests of this folder."""
    directory = tmp_path_factory.mktemp("vllm")
    model = tiny_model.write(directory / "tiny-qwen2")
    with pods.running(model, count=2) as started:
        yield started
