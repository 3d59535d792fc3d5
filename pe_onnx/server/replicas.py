"""The same application as a Ray Serve deployment: replicas over machines, autoscaling, rolling updates.

Source: Ray Serve 2.60, which schedules, restarts and updates; each replica is one ``create_app`` with an engine of its
own. A file for ``serve deploy`` names ``pe_onnx.server.replicas:build``; deployed again with another bundle, replicas
are replaced one after the other, each when its requests have ended.

A replica that dies takes its requests along: whoever waits for a whole answer gets status 500 and asks again, which
OpenAI's clients do by themselves (``max_retries``); a stream ends without ``[DONE]``.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pe_onnx.errors import ConfigError, did_you_mean, needs
from pe_onnx.server.options import ServerOptions

with needs("serve --ray", "'pe-onnx[serve,ray]'"):
    import ray
    import yaml
    from ray import serve

KEY_VARIABLE = "PE_ONNX_API_KEY"
APPLICATION = "pe_onnx"
IMPORT_PATH = f"{__name__}:build"
PROVIDERS = ("cpu", "cuda")
UNCOUNTED = 4
"""Requests that a replica takes beyond its slots, so that /health and /metrics do not wait for answers."""
BUSY = 0.75
"""Share of a replica's slots that are taken, on average, from which on another replica is started."""


@dataclass(frozen=True)
class Placement:
    """How many replicas, and what each takes."""

    replicas: int = 1
    most_replicas: int | None = None
    """More than ``replicas`` are started as slots fill up; None for a fixed number."""
    provider: str = "cpu"
    threads: int = 1
    grace_s: int = 30
    needs_key: bool = False
    """A replica without the environment's PE_ONNX_API_KEY does not start."""

    def __post_init__(self) -> None:
        most = self.replicas if self.most_replicas is None else self.most_replicas
        if not 1 <= self.replicas <= most:
            raise ConfigError(f"replicas = {self.replicas}-{most} must be N or LEAST-MOST, from 1 on")
        if self.provider not in PROVIDERS:
            accepted = ", ".join(PROVIDERS)
            raise ConfigError(f"provider = {self.provider!r}: Ray gives replicas their device; accepted: {accepted}")
        if self.grace_s < 0:
            raise ConfigError(f"grace_s = {self.grace_s} must be at least 0")
        if self.threads < 1:
            raise ConfigError(f"threads = {self.threads} must be at least 1: what each replica takes of a machine")


def build(arguments: Mapping[str, Any]) -> serve.Application:
    """The application that a configuration file describes.

    arguments: ``bundle``, a folder that every machine has, and fields of ``ServerOptions`` and ``Placement``. The key
    is the environment's PE_ONNX_API_KEY. Raises ConfigError for a name that is none of them.
    """
    given = dict(arguments)
    folder = Path(given.pop("bundle", "") or _missing("bundle"))
    kinds = (ServerOptions, Placement)
    known = {field.name for kind in kinds for field in dataclasses.fields(kind)} - {"api_key"}
    for name in given:
        if name not in known:
            raise ConfigError(
                f"unknown argument {name!r}{did_you_mean(name, known)} (known: bundle, {', '.join(known)})"
            )
    given.setdefault("name", folder.resolve().name)
    server, placement = (
        kind(**{field.name: given[field.name] for field in dataclasses.fields(kind) if field.name in given})
        for kind in kinds
    )
    assert isinstance(server, ServerOptions)
    assert isinstance(placement, Placement)
    return application(folder, server, placement)


def application(folder: Path, options: ServerOptions, placement: Placement) -> serve.Application:
    """A deployment of replicas, to hand to ``serve.run``."""
    engines: list[Any] = []

    def make() -> Any:
        """Called in each replica."""
        from pe_onnx.generate import load
        from pe_onnx.server.app import create_app
        from pe_onnx.server.inside import check_inside

        key = options.api_key or os.environ.get(KEY_VARIABLE) or None
        if placement.needs_key and key is None:
            raise ConfigError(f"{KEY_VARIABLE} is not set where the replica runs, and the configuration asks for a key")
        check_inside(folder)
        model = load(folder, placement.provider, placement.threads)
        app = create_app(model, dataclasses.replace(options, api_key=key))
        engines.append(app.state.engine)
        return app

    class Replica:
        """Requests go to the application; this only says whether it is well."""

        def check_health(self) -> None:
            if engines and not engines[-1].alive:
                raise RuntimeError("the engine has stopped")

    settings: dict[str, Any] = {
        "name": "Replica",
        "max_ongoing_requests": options.slots + UNCOUNTED,
        "max_queued_requests": options.max_queue,
        "backpressure_config": {"status_code": 429, "retry_after_s": 1},
        "graceful_shutdown_timeout_s": placement.grace_s,
        "health_check_period_s": 2,
        "ray_actor_options": {"num_cpus": placement.threads, "num_gpus": int(placement.provider == "cuda")},
    }
    if placement.most_replicas is None:
        settings["num_replicas"] = placement.replicas
    else:
        settings["autoscaling_config"] = {
            "min_replicas": placement.replicas,
            "max_replicas": placement.most_replicas,
            "target_ongoing_requests": max(BUSY * options.slots, 1),
        }
    return serve.deployment(**settings)(serve.ingress(make)(Replica)).bind()


def configuration(folder: Path, options: ServerOptions, placement: Placement, host: str, port: int) -> str:
    """The YAML that ``serve deploy`` and ``serve run`` take. It holds no key."""
    arguments = {"bundle": str(folder.resolve()), **_changed(options), **_changed(placement)}
    if arguments.pop("api_key", None):
        arguments["needs_key"] = True
    document = {
        "http_options": {"host": host, "port": port},
        "applications": [
            {"name": APPLICATION, "route_prefix": "/", "import_path": IMPORT_PATH, "args": arguments},
        ],
    }
    return yaml.safe_dump(document, sort_keys=False)


def run(folder: Path, options: ServerOptions, placement: Placement, host: str, port: int) -> None:
    """Start Ray on this machine, or join the cluster that RAY_ADDRESS names, and serve until interrupted.

    host, port: of a Serve that is started; one that runs in the cluster keeps its own.
    """
    joined = bool(os.environ.get("RAY_ADDRESS"))
    ray.init(configure_logging=False, include_dashboard=False)
    try:
        serve.start(http_options={"host": host, "port": port})
        serve.run(application(folder.resolve(), options, placement), name=APPLICATION, route_prefix="/", blocking=True)
    finally:
        if joined:
            serve.delete(APPLICATION)  # others' applications go on
        else:
            serve.shutdown()
        ray.shutdown()


def _changed(values: Any) -> dict[str, Any]:
    """Fields that are not what they are by default."""
    return {
        field.name: getattr(values, field.name)
        for field in dataclasses.fields(values)
        if getattr(values, field.name) != field.default
    }


def _missing(name: str) -> str:
    raise ConfigError(f"argument {name!r} is missing: the folder to serve")
