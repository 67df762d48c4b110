"""The server on Ray Serve: HTTP in front, replicas of the engine behind, on as many machines as the cluster has.

``unialign serve --engine ray --replicas 2`` runs it on this machine; on a cluster, ``serve deploy`` with
``deploy/ray-serve.yaml`` runs the same application through :func:`build`. The HTTP side holds no model: it keeps what
was accepted and sends it to another replica when one dies (:class:`~unialignment.serving.remote.RemoteEngine`). Knows
nothing of routes or models.
"""

from __future__ import annotations

import asyncio
import logging
import os
import pickle
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

from pydantic import BaseModel, Field

from unialignment.errors import InputError
from unialignment.model.folders import resolve_model
from unialignment.serving.remote import ModelFacts, RemoteEngine, Request
from unialignment.serving.requests import EngineSettings, Event, Failed, ServingError
from unialignment.serving.settings import ServerSettings, keys_from

# Before ray is imported, which reads it then: nothing is reported to anybody.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Ray's processes step back behind all others unless told not to; a server is no background job.
os.environ.setdefault("RAY_worker_niceness", "0")

try:
    import ray
    from ray import serve
    from ray.exceptions import RayError, RayTaskError, TaskCancelledError
    from ray.serve.exceptions import BackPressureError
    from ray.serve.handle import DeploymentHandle
except ImportError as missing:
    raise InputError(
        f"Ray Serve is not installed ({missing}): pip install 'unialignment[ray]', or serve without --engine ray"
    ) from missing

log = logging.getLogger(__name__)
APP_NAME = "unialignment"


class RayArguments(BaseModel, extra="forbid"):
    """Arguments of the application, ``args`` in the cluster's YAML.

    Attributes:
        model: Packaged name, folder or hub id; a folder must be there on every machine.
        device: Where replicas compute; the best there is unless given.
        dtype: Arithmetic.
        replicas: Replicas at the start, and the fewest.
        max_replicas: Most replicas; more than ``replicas`` switches autoscaling on.
        target_requests: Requests under way per replica that autoscaling aims at.
        cpus: CPUs that a replica reserves.
        gpus: GPUs that a replica reserves; a fraction lets several share one.
        threads: CPU threads of torch in a replica; as many as ``cpus`` unless given.
        frontends: Replicas of the HTTP side. The web page keeps sessions, so more than one needs ``web: false`` or a
            load balancer that sends a visitor to the same one.
        web: Whether to mount the web page.
        health_seconds: Seconds between health checks of a replica; three failures replace it.
        drain_seconds: Seconds in which a replica that is being replaced finishes its requests.
        engine: Limits of each replica's engine, by name.
        server: Limits of the HTTP side, by name.
    """

    model: str = "nano"
    device: str | None = None
    dtype: str | None = None
    replicas: int = Field(1, ge=1, le=1000)
    max_replicas: int | None = Field(None, ge=1, le=1000)
    target_requests: float = Field(8.0, gt=0)
    cpus: float = Field(1.0, ge=0)
    gpus: float = Field(0.0, ge=0)
    threads: int | None = Field(None, ge=1)
    frontends: int = Field(1, ge=1, le=100)
    web: bool = True
    health_seconds: float = Field(5.0, gt=0)
    drain_seconds: float = Field(120.0, ge=0)
    engine: dict[str, Any] = Field(default_factory=dict)
    server: dict[str, Any] = Field(default_factory=dict)

    def server_settings(self) -> ServerSettings:
        """Settings of the HTTP side; API keys come from ``UNIALIGN_API_KEYS`` of the machine that runs it.

        Raises:
            InputError: A limit is unknown, or URLs are allowed, which replicas don't fetch.
        """
        if self.server.get("allow_urls"):
            raise InputError("pictures from URLs are not fetched on Ray; leave allow_urls (--allow-urls) out")
        try:
            engine = EngineSettings(**self.engine)
            return replace(ServerSettings(api_keys=keys_from(), web=self.web, engine=engine), **self.server)
        except TypeError as error:
            raise InputError(f"unknown limit in `engine` or `server`: {error}") from error


class ModelReplica:
    """One engine on one model. Errors travel as events, so that none is taken for a lost replica."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        import torch

        import unialignment
        from unialignment.serving.engine import Engine

        args = RayArguments(**arguments)
        torch.set_num_threads(args.threads or max(1, round(args.cpus)))
        pipe = unialignment.load(args.model, device=args.device, dtype=args.dtype)
        self.engine = Engine(pipe, args.server_settings().engine)

    async def facts(self) -> ModelFacts:
        """Of the model it holds."""
        return ModelFacts.of(self.engine.pipe)

    async def run(self, request: Request) -> AsyncIterator[Event]:
        """The events of a request; the last is ``Done`` or ``Failed``."""
        try:
            handle = await asyncio.to_thread(self.engine.submit, request)
        except Exception as error:
            yield Failed(_portable_error(error))
            return
        try:
            async for event in handle:
                yield Failed(_portable_error(event.error)) if isinstance(event, Failed) else event
        finally:
            handle.cancel()

    def pid(self) -> int:
        """Of the replica's process."""
        return os.getpid()

    def check_health(self) -> None:
        """Ray calls this; an engine whose thread died can't recover, so the replica is replaced.

        Raises:
            RuntimeError: The engine is dead.
        """
        if not self.engine.alive:
            raise RuntimeError("the engine's thread has died")

    def __del__(self) -> None:
        engine = getattr(self, "engine", None)
        if engine is not None:
            engine.close()


class RayBackend:
    """Streams through a Ray Serve handle."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._run = handle.options(method_name="run", stream=True)

    async def stream(self, request: Request) -> AsyncIterator[Event]:
        """See :class:`~unialignment.serving.remote.Backend`."""
        response: Any = self._run.remote(request)  # a generator, because the handle streams
        finished = False
        try:
            async for event in response:
                yield event
            finished = True
        finally:
            if not finished:
                response.cancel()

    @staticmethod
    def is_loss(error: BaseException) -> bool:
        """Anything of Ray's own that is neither the replica's code nor a cancellation."""
        return isinstance(error, RayError) and not isinstance(error, (RayTaskError, TaskCancelledError))

    @staticmethod
    def is_full(error: BaseException) -> bool:
        """Whether the handle's queue is full."""
        return isinstance(error, BackPressureError)


class Frontend:
    """The HTTP side: routes, the page, and the requests that were accepted."""

    async def __init__(self, model: DeploymentHandle, arguments: dict[str, Any]) -> None:  # type: ignore[misc]
        args = RayArguments(**arguments)
        self.settings = args.server_settings()
        facts = await model.facts.remote()
        most = max(args.replicas, args.max_replicas or 0)
        self.engine = RemoteEngine(RayBackend(model), facts, self.settings.engine, replicas=most)

    def __serve_build_asgi_app__(self) -> Any:
        from unialignment.serving.app import create_app

        return create_app(self.engine, self.settings)  # type: ignore[arg-type]

    def retries(self) -> int:
        """Requests that were sent again because their replica was lost."""
        return self.engine.retries

    def check_health(self) -> None:
        """Ray calls this.

        Raises:
            RuntimeError: The thread that carries the requests is dead.
        """
        if not self.engine.alive:
            raise RuntimeError("the thread that carries the requests has died")


def build(args: RayArguments) -> serve.Application:
    """The application, for ``serve deploy`` and ``serve run``.

    Args:
        args: Validated by Ray from the YAML's ``args``.
    """
    arguments = args.model_dump()
    limits = args.server_settings().engine
    scaling: dict[str, Any] = {"num_replicas": args.replicas}
    if args.max_replicas is not None and args.max_replicas > args.replicas:
        scaling = {
            "num_replicas": "auto",
            "autoscaling_config": {
                "min_replicas": args.replicas,
                "initial_replicas": args.replicas,
                "max_replicas": args.max_replicas,
                "target_ongoing_requests": args.target_requests,
                "upscale_delay_s": 10,
                "downscale_delay_s": 300,
            },
        }
    deployment: Any = serve.deployment
    model = deployment(ModelReplica).options(
        name="model",
        ray_actor_options={"num_cpus": args.cpus, "num_gpus": args.gpus},
        # The engine batches what it is given and bounds its own queue, so a replica is given much at once.
        max_ongoing_requests=limits.max_active + limits.max_queue // 2,
        max_queued_requests=limits.max_queue,
        health_check_period_s=args.health_seconds,
        health_check_timeout_s=max(30.0, 3 * args.health_seconds),
        graceful_shutdown_timeout_s=args.drain_seconds,
        graceful_shutdown_wait_loop_s=1.0,
        **scaling,
    )
    frontend = deployment(serve.ingress()(Frontend)).options(
        name="frontend",
        num_replicas=args.frontends,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=10_000,
        health_check_period_s=args.health_seconds,
        graceful_shutdown_timeout_s=args.drain_seconds,
    )
    application: serve.Application = frontend.bind(model.bind(arguments), arguments)
    return application


def start(args: RayArguments, host: str, port: int, *, blocking: bool = True) -> None:
    """Run on this machine, or on the cluster that ``RAY_ADDRESS`` names.

    Args:
        args: The application's arguments.
        host: Address to listen on.
        port: TCP port.
        blocking: Whether to stay until interrupted.

    Raises:
        UniAlignmentError: An argument is unusable, or replicas could not be started.
    """
    application = build(args)
    if not os.environ.get("RAY_ADDRESS"):  # other machines may have other folders
        resolve_model(args.model)
    if not ray.is_initialized():
        # Replicas reserve CPUs as promises to the scheduler, not as hardware: two replicas may share one core.
        cpus = None if os.environ.get("RAY_ADDRESS") else max(os.cpu_count() or 1, int(args.replicas * args.cpus) + 1)
        ray.init(num_cpus=cpus, include_dashboard=False, log_to_driver=False, configure_logging=False)
    serve.start(http_options={"host": host, "port": port}, logging_config={"enable_access_log": False})
    try:
        serve.run(application, name=APP_NAME, route_prefix="/", blocking=blocking)
    except RuntimeError as error:
        raise ServingError(f"{error} Ray's logs say why, on this machine under /tmp/ray/session_latest/logs") from error


def stop() -> None:
    """Take the application down and leave Ray."""
    serve.shutdown()
    ray.shutdown()


def _portable_error(error: BaseException) -> BaseException:
    """An error that survives the way to another process."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return ServingError(f"{type(error).__name__}: {error}")
    return error
