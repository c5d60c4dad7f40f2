"""What an operator can watch of a host, as Prometheus reads it. It names no user and no item."""

import time
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pfm_llm.agent.host.batcher import Batcher

_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")
_NONE = "none"
"""Label of a request that reached no route, or has none of the usual methods."""
Gauges = dict[str, tuple[str, Callable[[], float]]]
"""By name what it says, and how to read it."""


class Metrics:
    """Counts requests, and reads the counts of the passes.

    Args:
        batcher: Makes the passes.
        gauges: What else is read whenever somebody asks.
    """

    def __init__(self, batcher: Batcher, gauges: Gauges) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "pfm_requests",
            "Requests that were answered.",
            ("route", "method", "status"),
            registry=self._registry,
        )
        self._seconds = Histogram(
            "pfm_request_seconds",
            "Seconds to the end of an answer.",
            ("route",),
            registry=self._registry,
            buckets=(0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30),
        )
        self._registry.register(_Passes(batcher, gauges))

    def note(self, scope: Scope, status: int, seconds: float) -> None:
        """Count a request that was answered."""
        route = getattr(scope.get("route"), "path", _NONE)
        method = scope["method"] if scope["method"] in _METHODS else _NONE
        self._requests.labels(route, method, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def text(self) -> bytes:
        """All of it in the text format of Prometheus."""
        return generate_latest(self._registry)


class _Passes(Collector):
    """The counts of a batcher, and gauges."""

    def __init__(self, batcher: Batcher, gauges: Gauges) -> None:
        self._batcher, self._gauges = batcher, gauges

    def collect(self) -> Iterator[Metric]:
        """See `Collector`."""
        counts = self._batcher.counts
        for name, about, value in (
            ("pfm_ranked", "Rankings that passes have given.", counts.users),
            ("pfm_passes", "Passes of the model.", counts.passes),
            ("pfm_refused", "Rankings that were refused: too many waited.", counts.refused),
            ("pfm_failed", "Rankings that ended with an error.", counts.failed),
        ):
            yield CounterMetricFamily(name, about, value=value)
        yield GaugeMetricFamily(
            "pfm_waiting", "Rankings that wait for a pass.", value=self._batcher.num_waiting
        )
        for name, (about, read) in self._gauges.items():
            yield GaugeMetricFamily(name, about, value=read())


class Metered:
    """Counts each request of an application, also those that it refuses.

    Args:
        app: The application.
        metrics: Where it counts.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand the request on, and count it."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        started, status = time.perf_counter(), 500

        async def send_noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, send_noted)
        finally:
            self._metrics.note(scope, status, time.perf_counter() - started)
