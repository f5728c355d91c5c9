import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from gateway.fleet.scrape import PodLoad, parse_load

SAMPLE = (Path(__file__).parent / "data" / "vllm-0.32-metrics.txt").read_text()
GAUGES = {
    "running_requests": "vllm:num_requests_running",
    "waiting_requests": "vllm:num_requests_waiting",
    "kv_usage_ratio": "vllm:kv_cache_usage_perc",
}
COUNTERS = {
    "prefix_cache_queries_tokens": "vllm:prefix_cache_queries_total",
    "prefix_cache_hits_tokens": "vllm:prefix_cache_hits_total",
    "prompt_tokens": "vllm:prompt_tokens_total",
    "generation_tokens": "vllm:generation_tokens_total",
}


def with_prometheus_client(text: str) -> dict[str, list[float]]:
    """The same page read by the official parser: sample name -> finite values."""
    values: dict[str, list[float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if math.isfinite(sample.value):
                values.setdefault(sample.name, []).append(sample.value)
    return values


def test_a_real_vllm_page_has_everything() -> None:
    load = parse_load(SAMPLE)
    official = with_prometheus_client(SAMPLE)
    assert load.missing == ()
    assert load.renamed == ()
    assert load.engines == 1
    for field, name in (GAUGES | COUNTERS).items():
        assert getattr(load, field) == official[name][0]
    assert load.prompt_tokens
    assert load.prefix_cache_hits_tokens
    assert load.capacity_tokens == (load.num_blocks or 0) * (load.block_size_tokens or 0)


@pytest.mark.parametrize(("field", "name"), (GAUGES | COUNTERS).items())
def test_a_missing_name_is_unknown_and_not_zero(field: str, name: str) -> None:
    load = parse_load(SAMPLE.replace(name, f"{name}_gone"))
    assert getattr(load, field) is None
    assert load.missing == (name,)


@pytest.mark.parametrize(
    ("field", "name", "older"),
    [
        ("kv_usage_ratio", "vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc"),
        (
            "prefix_cache_hits_tokens",
            "vllm:prefix_cache_hits_total",
            "vllm:gpu_prefix_cache_hits_total",
        ),
        (
            "prefix_cache_queries_tokens",
            "vllm:prefix_cache_queries_total",
            "vllm:gpu_prefix_cache_queries",
        ),
    ],
)
def test_an_older_name_is_read_and_reported(field: str, name: str, older: str) -> None:
    load = parse_load(SAMPLE.replace(name, older))
    assert getattr(load, field) == getattr(parse_load(SAMPLE), field)
    assert load.renamed == ((name, older),)
    assert load.missing == ()


def test_capacity_is_blocks_times_block_size_where_the_engine_does_not_tell() -> None:
    load = parse_load('vllm:cache_config_info{block_size="16",num_gpu_blocks="100"} 1.0\n')
    assert load.capacity_tokens == 1600


def test_a_block_count_of_none_leaves_the_capacity_unknown() -> None:
    load = parse_load('vllm:cache_config_info{block_size="16",num_gpu_blocks="None"} 1.0\n')
    assert load.capacity_tokens is None
    assert load.block_size_tokens == 16
    assert "vllm:cache_config_info{num_gpu_blocks}" in load.missing


def test_capacity_is_unknown_when_one_engine_does_not_tell_its_own() -> None:
    load = parse_load(
        'vllm:cache_config_info{engine="0",block_size="16",num_gpu_blocks="100"} 1\n'
        'vllm:cache_config_info{engine="1",block_size="16",num_gpu_blocks="None"} 1\n'
    )
    assert load.engines == 2
    assert load.capacity_tokens is None


@pytest.mark.parametrize("value", ["NaN", "+Inf", "oops", ""])
def test_a_value_that_is_no_number_is_unknown(value: str) -> None:
    load = parse_load(f'vllm:num_requests_running{{engine="0"}} {value}\n')
    assert load.running_requests is None


def test_nothing_of_a_page_without_vllm_names_is_known() -> None:
    load = parse_load('http_requests_total{handler="/metrics"} 3.0\n')
    assert load.engines == 0
    assert {getattr(load, field) for field in GAUGES | COUNTERS} == {None}
    assert load.capacity_tokens is None


# Whatever a model may be called, braces, quotes, spaces and line ends too.
label_values = st.text(max_size=20).map(
    lambda text: text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
)
numbers = st.floats(min_value=0, max_value=1e12)


@given(model=label_values, engines=st.lists(numbers, min_size=1, max_size=4), data=st.data())
def test_it_reads_what_the_official_parser_reads(
    model: str, engines: list[float], data: st.DataObject
) -> None:
    lines = []
    for name in data.draw(st.permutations([*GAUGES.values(), *COUNTERS.values()])):
        kind = "counter" if name.endswith("_total") else "gauge"
        lines += [f"# HELP {name} {name} of the engine", f"# TYPE {name} {kind}"]
        for engine, value in enumerate(engines):
            lines.append(f'{name}{{engine="{engine}",model_name="{model}"}} {value!r}')
        lines.append(f'{name}_by_reason{{reason="{model}"}} 7.0')
    text = "\n".join(lines) + "\n"
    official, load = with_prometheus_client(text), parse_load(text)
    assert load.engines == len(engines)
    for field, name in (GAUGES | COUNTERS).items():
        if field == "kv_usage_ratio":
            expected: float = math.fsum(official[name]) / len(engines)
        else:
            expected = round(math.fsum(official[name]))
        assert getattr(load, field) == expected


@given(st.text(alphabet=st.sampled_from('{}"\\=,\n\t 01.eNa_vlm:'), max_size=200))
def test_no_page_makes_it_raise(noise: str) -> None:
    for name in (*GAUGES.values(), *COUNTERS.values(), "vllm:cache_config_info"):
        assert isinstance(parse_load(name + noise), PodLoad)


def test_the_load_of_one_rank_is_its_own() -> None:
    page = """vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:num_requests_running{engine="1",model_name="m"} 5.0
vllm:cache_config_info{block_size="16",engine="0",num_gpu_blocks="10"} 1.0
vllm:cache_config_info{block_size="16",engine="1",num_gpu_blocks="20"} 1.0
"""
    assert [
        (parse_load(page, rank).running_requests, parse_load(page, rank).capacity_tokens)
        for rank in (None, 0, 1, 2)
    ] == [(8, 480), (3, 160), (5, 320), (None, None)]
