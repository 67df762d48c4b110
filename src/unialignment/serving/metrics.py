"""Counters for Prometheus: requests by route and status, their durations, and the engine's own figures."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from fastapi import Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from unialignment.serving.engine import Engine

_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_GAUGES = ("queued", "active", "samples", "reserved_bytes", "memory_bytes", "step_seconds")
_COUNTERS = ("submitted", "completed", "failed", "cancelled", "expired", "refused", "passes", "rows")


class _EngineCollector(Collector):
    """The engine's figures at the moment of asking."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def collect(self) -> Iterator[Metric]:
        """One family for each figure; what it means is said in ``EngineStats``."""
        stats = self.engine.stats()
        yield GaugeMetricFamily("unialign_engine_alive", "whether the engine takes requests", value=float(stats.alive))
        for name in _GAUGES:
            yield GaugeMetricFamily(f"unialign_engine_{name}", f"{name} now", value=getattr(stats, name))
        for name in _COUNTERS:
            yield CounterMetricFamily(f"unialign_engine_{name}", f"{name} so far", value=getattr(stats, name))


class Metrics:
    """Counters of one application.

    Args:
        engine: Whose figures to show as well.
    """

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_EngineCollector(engine))
        labels = ("route", "method", "status")
        self.requests = Counter("unialign_http_requests", "requests answered", labels, registry=self.registry)
        self.seconds = Histogram(
            "unialign_http_request_seconds", "from request to end of response", ("route",),
            buckets=_BUCKETS, registry=self.registry,
        )  # fmt: skip

    def response(self) -> Response:
        """All of it, as Prometheus reads it."""
        return Response(generate_latest(self.registry), media_type=CONTENT_TYPE_LATEST)


class Measured:
    """Counts what passes through an application.

    Args:
        app: The application.
        metrics: Where to count.
        clock: Seconds.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, clock: Callable[[], float] = time.monotonic) -> None:
        self.app, self.metrics, self.clock = app, metrics, clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = self.clock(), "aborted"

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        try:
            await self.app(scope, receive, noted)
        finally:
            # Declared routes only: paths are the client's to choose and would each be a new series.
            route = getattr(scope.get("route"), "path", "other")
            self.metrics.requests.labels(route, scope["method"], status).inc()
            self.metrics.seconds.labels(route).observe(self.clock() - started)
