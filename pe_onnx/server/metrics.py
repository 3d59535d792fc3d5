"""What /metrics tells Prometheus."""

from __future__ import annotations

import time

from pe_onnx.errors import needs
from pe_onnx.server.choices import Choice, first_of_each_prompt
from pe_onnx.server.engine import Engine

with needs("serve", "'pe-onnx[serve]'"):
    from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest

    disable_created_metrics()  # when a series began: a line for each, which nobody asked for

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Metrics:
    """Counters of one application, in a registry of their own."""

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        common = {"registry": self.registry, "namespace": "pe_onnx"}
        self.requests = Counter("requests", "Requests answered.", ("route", "status"), **common)
        self.prompt_tokens = Counter("prompt_tokens", "Tokens of prompts.", **common)
        self.reused_tokens = Counter("reused_tokens", "Of them those that a slot held already.", **common)
        self.new_tokens = Counter("new_tokens", "Tokens of answers.", **common)
        self.cancelled = Counter("cancelled", "Requests whose client left.", **common)
        self.first_token_s = Histogram("first_token_seconds", "Request to first token.", buckets=SECONDS, **common)
        self.request_s = Histogram("request_seconds", "Request to last token.", buckets=SECONDS, **common)
        self.queue_s = Histogram("queue_seconds", "Request to slot.", buckets=SECONDS, **common)
        Gauge("running", "Requests in slots.", **common).set_function(lambda: engine.running)
        Gauge("waiting", "Requests that wait for a slot.", **common).set_function(lambda: engine.waiting)
        Gauge("slots", "Slots.", **common).set(engine.slots.batch_size)
        Gauge("cached_tokens", "Tokens that slots hold.", **common).set_function(
            lambda: int(engine.slots.lengths.sum())
        )
        Gauge("steps_taken", "Steps of the batch since the start.", **common).set_function(lambda: engine.steps)

    def text(self) -> bytes:
        return generate_latest(self.registry)

    def ended(self, choices: list[Choice], begun: float) -> None:
        """Count a request that has ended, answered or not; begun: when it came, by ``time.monotonic()``."""
        for work in first_of_each_prompt(choices):
            self.prompt_tokens.inc(len(work.prompt))
            self.reused_tokens.inc(work.reused_tokens)
        for choice in choices:
            work = choice.work
            self.new_tokens.inc(len(choice.tokens))
            if work.begun is not None:
                self.queue_s.observe(work.begun - begun)
        self.request_s.observe(time.monotonic() - begun)
