"""What a server counts for Prometheus."""

import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class Metrics:
    """Counters for Prometheus."""

    def __init__(self, waiting: Callable[[], float]) -> None:
        self.registry = at = CollectorRegistry()
        self.requests = Counter("waveflow_requests", "Requests.", ["route", "status"], registry=at)
        self.seconds = Histogram(
            "waveflow_request_seconds",
            "Until the last byte.",
            ["route"],
            registry=at,
        )
        self.audio = Counter("waveflow_audio_seconds", "Speech made.", registry=at)
        self.batches = Histogram(
            "waveflow_batch_size", "Mels decoded together.", buckets=(1, 2, 4, 8, 16, 32),
            registry=at,
        )  # fmt: skip
        Gauge("waveflow_waiting", "Requests not done.", registry=at).set_function(waiting)


class Measured:
    """Counts requests, their times and the status of their answers; an ASGI middleware."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        begin, status = time.monotonic(), 500

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, counted)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self.metrics.requests.labels(route, status).inc()
            self.metrics.seconds.labels(route).observe(time.monotonic() - begin)
