"""
The run as Prometheus reads it: docs/metrics.md names every figure.

Read from the status at each scrape; what is unknown is left out, never 0.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.openmetrics.exposition import CONTENT_TYPE_LATEST as CONTENT_TYPE
from prometheus_client.openmetrics.exposition import generate_latest

from stepguardd.core.breaker import Phase
from stepguardd.core.state import GateOrder, Mode, ServerState

__all__ = ["CONTENT_TYPE", "exposition", "families"]


def exposition(status: Mapping[str, Any], *, quiet_s: float) -> bytes:
    """
    The whole answer to a scrape, in OpenMetrics text.

    Args:
        status: the daemon's status.
        quiet_s: since its loop decided last.

    """
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Once(families(status, quiet_s=quiet_s)))
    text: bytes = generate_latest(registry)  # type: ignore[no-untyped-call]
    return text


class _Once:
    def __init__(self, found: Iterator[Metric]) -> None:
        self._found = found

    def collect(self) -> Iterator[Metric]:
        return self._found


def families(status: Mapping[str, Any], *, quiet_s: float) -> Iterator[Metric]:
    """Each figure with its help, in the order of docs/metrics.md."""
    info = GaugeMetricFamily("stepguard_build_info", "The daemon's version; always 1.", labels=["version"])
    info.add_metric([str(status.get("version", ""))], 1)
    yield info
    yield _gauge("stepguard_uptime_seconds", "Since the daemon came up.", status.get("uptime_s"))
    yield _gauge("stepguard_decision_age_seconds", "Since the decision loop decided last.", quiet_s)
    yield _one_of(
        "stepguard_mode_info",
        "How far the daemon may go by itself: 1 for the mode in force.",
        "mode",
        [mode.value for mode in Mode],
        status.get("mode"),
    )
    breaker, gate, trainer = (_table(status, key) for key in ("breaker", "gate", "trainer"))
    yield _one_of(
        "stepguard_breaker_phase_info",
        "The breaker: 1 for the phase it is in.",
        "phase",
        [phase.value for phase in Phase],
        breaker.get("phase"),
    )
    yield _gauge(
        "stepguard_breaker_phase_age_seconds", "For how long it is in this phase.", breaker.get("since_s")
    )
    yield _one_of(
        "stepguard_gate_order_info",
        "The order on the gate page: 1 for the one given.",
        "order",
        [order.value for order in GateOrder],
        gate.get("order"),
    )
    held = None if "order" not in gate else float(gate["order"] != GateOrder.GO.value)
    yield _gauge("stepguard_gate_held_ratio", "1 while the trainer is not free to go, else 0.", held)
    yield _gauge("stepguard_trainer_up_ratio", "1 while the trainer lives.", trainer.get("alive"))
    yield _gauge("stepguard_trainer_step_number", "The step that the trainer is at.", trainer.get("step"))
    yield _gauge(
        "stepguard_trainer_committed_step_number",
        "The newest step whose optimizer step was taken.",
        trainer.get("committed_step"),
    )
    yield _gauge(
        "stepguard_trainer_attempt_number", "Counts rollbacks and relaunches.", trainer.get("attempt")
    )
    yield _gauge("stepguard_trainer_reward_value", "The newest step's reward.", trainer.get("reward"))
    yield _gauge(
        "stepguard_trainer_heartbeat_age_seconds",
        "Since the trainer gave a sign of life.",
        trainer.get("beat_age_s"),
    )
    yield _counter("stepguard_incidents", "Incidents of this run.", status.get("incidents"))
    yield _gauge(
        "stepguard_incident_open_ratio", "1 while an incident is open.", status.get("incident") is not None
    )
    yield _counter(
        "stepguard_refused_batches", "Batches kept from an optimizer step.", status.get("refused_batches")
    )
    yield _gauge(
        "stepguard_restarts_left_number",
        "Restarts that the budget still allows.",
        _table(status, "budget").get("restarts_left"),
    )
    yield _gauge(
        "stepguard_warnings_number", "Warnings that the status shows.", len(status.get("warnings") or ())
    )
    yield from _servers(_tables(status, "servers"))
    yield from _gpus(_tables(status, "gpus"))


def _servers(servers: Sequence[Mapping[str, Any]]) -> Iterator[Metric]:
    states = GaugeMetricFamily(
        "stepguard_server_state_info", "1 for the state that a server is in.", labels=["server", "state"]
    )
    ages = GaugeMetricFamily(
        "stepguard_server_state_age_seconds", "For how long it is in that state.", labels=["server"]
    )
    restarts = CounterMetricFamily(
        "stepguard_server_restarts", "Restarts of a server by this daemon.", labels=["server"]
    )
    for server in servers:
        name = str(server.get("name", ""))
        for state in ServerState:
            if len(servers) <= 64 or state.value == server.get("state"):
                states.add_metric([name, state.value], float(state.value == server.get("state")))
        if (age := _number(server.get("since_s"))) is not None:
            ages.add_metric([name], age)
        if (count := _number(server.get("restarts"))) is not None:
            restarts.add_metric([name], count)
    yield from (states, ages, restarts)


def _gpus(gpus: Sequence[Mapping[str, Any]]) -> Iterator[Metric]:
    for key, name, text in (
        ("used_bytes", "stepguard_gpu_memory_used_bytes", "Memory in use on a GPU."),
        ("total_bytes", "stepguard_gpu_memory_total_bytes", "Memory that a GPU has."),
    ):
        family = GaugeMetricFamily(name, text, labels=["gpu"])
        for gpu in gpus:
            if (value := _number(gpu.get(key))) is not None:
                family.add_metric([str(gpu.get("index", gpu.get("name", "")))], value)
        yield family


def _one_of(name: str, text: str, label: str, values: Sequence[str], now: object) -> Metric:
    family = GaugeMetricFamily(name, text, labels=[label])
    for value in values:
        family.add_metric([value], float(value == now))
    return family


def _gauge(name: str, text: str, value: object) -> Metric:
    known = _number(value)
    family = GaugeMetricFamily(name, text)
    if known is not None:
        family.add_metric([], known)
    return family


def _counter(name: str, text: str, value: object) -> Metric:
    known = _number(value)
    family = CounterMetricFamily(name, text)
    if known is not None:
        family.add_metric([], known)
    return family


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _table(status: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = status.get(key)
    return value if isinstance(value, Mapping) else {}


def _tables(status: Mapping[str, Any], key: str) -> Sequence[Mapping[str, Any]]:
    value = status.get(key)
    return [one for one in value if isinstance(one, Mapping)] if isinstance(value, list | tuple) else []
