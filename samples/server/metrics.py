"""What Prometheus reads at /metrics."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

__all__ = ["Metrics"]

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 20, 30, 60, 120, 300)


class Metrics:
    """Counters of one service, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"attnspan_{name}", text, labels, registry=self.registry)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"attnspan_{name}", text, registry=self.registry)

        def seconds(name: str, text: str, *labels: str) -> Histogram:
            return Histogram(f"attnspan_{name}", text, labels, registry=self.registry, buckets=SECONDS)

        self.requests = counter("requests", "HTTP requests answered", "path", "status")
        self.request_seconds = seconds("request_seconds", "From a request's head to the end of its answer", "path")
        self.finished = counter("generations", "Generations by how they ended: stop, length, cancelled, failed", "reason")
        self.refused = counter("refused", "Generations refused: queue full, or about to stop", "reason")
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts computed")
        self.tokens = counter("generated_tokens", "Tokens generated")
        self.first_token = seconds("time_to_first_token_seconds", "From a request's admission to the queue to its first token")
        self.between_tokens = seconds("time_between_tokens_seconds", "Between tokens of one generation")
        self.steps = Histogram(
            "attnspan_step_rows", "Rows of a decode step", registry=self.registry, buckets=(1, 2, 4, 8, 16, 32, 64)
        )
        self.running = gauge("running", "Generations that have a row")
        self.waiting = gauge("waiting", "Generations in the queue")
        self.kv_used = gauge("kv_bytes", "Bytes of KV cache that running generations may touch")
        self.kv_budget = gauge("kv_bytes_limit", "Most bytes of KV cache for all of them")

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)
