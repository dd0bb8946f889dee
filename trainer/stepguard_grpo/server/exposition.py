"""
`/metrics`: the counters, gauges and histograms that SGLang's names promise, in Prometheus' text format.

Only figures that this server really has are offered. Names, label names and bucket edges are SGLang 0.5.23's
where it has them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping

LATENCY_BUCKETS_S = (
    0.1,
    0.2,
    0.4,
    0.6,
    0.8,
    1,
    2,
    4,
    6,
    8,
    10,
    20,
    40,
    60,
    80,
    100,
    200,
    400,
    600,
    1200,
    2400,
)

Labels = tuple[tuple[str, str], ...]


class Histogram:
    """Observations counted by bucket."""

    def __init__(self, edges: tuple[float, ...]) -> None:
        self._edges = edges
        self._counts = [0] * (len(edges) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Count one value."""
        self._counts[bisect_left(self._edges, value)] += 1
        self._sum += value

    def lines(self, name: str, labels: Labels) -> list[str]:
        """Bucket, sum and count samples."""
        result, total = [], 0
        for edge, count in zip((*map(str, self._edges), "+Inf"), self._counts, strict=True):
            total += count
            result.append(sample(f"{name}_bucket", total, (*labels, ("le", edge))))
        return [*result, sample(f"{name}_sum", self._sum, labels), sample(f"{name}_count", total, labels)]


class Figures:
    """What the parent counts over its life."""

    def __init__(self) -> None:
        self.requests_total = 0
        self.aborted_total = 0
        self.cached_tokens_total = 0
        self.e2e_latency_s = Histogram(LATENCY_BUCKETS_S)
        self.responses: Counter[tuple[str, str, str]] = Counter()  # endpoint, method, status


def sample(name: str, value: float, labels: Labels) -> str:
    """One line of the text format."""
    text = ",".join(f'{key}="{_escaped(label)}"' for key, label in sorted(labels))
    return f"{name}{{{text}}} {float(value)}"


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def render(
    figures: Figures,
    load: Mapping[str, float],
    *,
    model_name: str,
    capacity_tokens: int,
    active: int,
    paused: int,
) -> str:
    """The whole page."""
    labels: Labels = (("engine_type", "unified"), ("model_name", model_name))
    labels += (("moe_ep_rank", "0"), ("pp_rank", "0"), ("tp_rank", "0"))
    used = load.get("num_used_tokens", 0)
    gauges = {
        "num_running_reqs": load.get("num_running_reqs", 0),
        "num_queue_reqs": load.get("num_waiting_reqs", 0),
        "num_retracted_reqs": load.get("num_retracted_reqs", 0),
        "num_paused_reqs": paused,
        "num_used_tokens": used,
        "token_usage": used / capacity_tokens,
        "max_total_num_tokens": capacity_tokens,
        "cache_hit_rate": 0.0,
        "gen_throughput": load.get("gen_throughput", 0.0),
    }
    counters = {
        "prompt_tokens_total": load.get("prompt_tokens_total", 0),
        "generation_tokens_total": load.get("generation_tokens_total", 0),
        "cached_tokens_total": figures.cached_tokens_total,
        "num_requests_total": figures.requests_total,
        "num_aborted_requests_total": figures.aborted_total,
    }
    lines: list[str] = []
    for kind, values in (("gauge", gauges), ("counter", counters)):
        for name, value in values.items():
            lines += [f"# TYPE sglang:{name} {kind}", sample(f"sglang:{name}", value, labels)]
    generate: Labels = (("endpoint", "/generate"), ("method", "POST"))
    lines.append("# TYPE sglang:http_requests_active gauge")
    lines.append(sample("sglang:http_requests_active", active, generate))
    lines.append("# TYPE sglang:http_responses_total counter")
    for (endpoint, method, status), count in sorted(figures.responses.items()):
        found: Labels = (("endpoint", endpoint), ("method", method), ("status_code", status))
        lines.append(sample("sglang:http_responses_total", count, found))
    name = "sglang:e2e_request_latency_seconds"
    lines += [f"# TYPE {name} histogram", *figures.e2e_latency_s.lines(name, labels)]
    return "\n".join(lines) + "\n"
