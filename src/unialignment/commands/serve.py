"""``unialign serve``: the API and the web page on one port."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import fields
from typing import TYPE_CHECKING

from unialignment.commands import common
from unialignment.errors import InputError

if TYPE_CHECKING:
    from unialignment.serving.settings import ServerSettings

_NEEDED = {"fastapi", "uvicorn", "multipart", "python_multipart", "prometheus_client", "h11", "starlette"}


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``unialign serve``."""
    server = parser.add_argument_group("server")
    server.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    server.add_argument("--port", type=int, default=8000, help="TCP port; 0 takes a free one (default: %(default)s)")
    server.add_argument(
        "--api-key", action="append", default=[], metavar="KEY",
        help="ask for this key; repeatable. Better in UNIALIGN_API_KEYS, which other users of the machine can't read",
    )  # fmt: skip
    server.add_argument("--no-web", action="store_true", help="the API alone, without the web page")
    server.add_argument(
        "--alias", action="append", default=[], metavar="NAME",
        help="also answer to this model name, for applications that can't be told another; repeatable",
    )  # fmt: skip
    server.add_argument("--engine", choices=("local", "ray"), default="local", help="where to run (default: here)")
    server.add_argument("--replicas", type=int, default=1, metavar="N", help="copies of the model, with --engine ray")
    limits = parser.add_argument_group("limits")
    limits.add_argument("--max-queue", type=int, metavar="N", help="requests that may wait (default: 64)")
    limits.add_argument(
        "--max-rows", type=int, metavar="N", help="rows of one forward pass (default: 16 on CPUs, 64 elsewhere)"
    )
    limits.add_argument("--max-steps", type=int, metavar="N", help="denoising steps of a request (default: 200)")
    limits.add_argument("--max-n", type=int, metavar="N", help="results of one request (default: 8)")
    limits.add_argument("--max-body-mib", type=int, metavar="N", help="size of a request's body (default: 32)")
    limits.add_argument("--timeout", type=float, metavar="SECONDS", help="for one request (default: 300)")
    limits.add_argument("--memory-mib", type=int, metavar="N", help="for all requests (default: a quarter of the free)")
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model", default=common.DEFAULT_MODEL, help="packaged name, folder, or hub id (default: %(default)s)"
    )
    model.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: the best there is)")
    model.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="arithmetic (default: float32)")
    model.add_argument(
        "--allow-urls", action="store_true",
        help="fetch pictures from http(s) URLs that clients name; they then reach what this machine reaches",
    )  # fmt: skip
    model.add_argument("--quiet", "-q", action="store_true", help="log warnings only")


def serve(args: argparse.Namespace) -> int:
    """Serve until interrupted."""
    try:
        import fastapi  # noqa: F401

        from unialignment.serving.engine import Engine
        from unialignment.serving.server import address, configure, listen
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _NEEDED:
            raise
        raise InputError(f"serving needs {error.name}: pip install 'unialignment[serve]'") from error
    settings = _settings(args)
    if args.engine == "ray":
        return _serve_with_ray(args, settings)
    import uvicorn

    import unialignment
    from unialignment.serving.app import create_app

    with listen(settings) as socket:  # before the model is loaded: a port in use is known at once
        pipe = unialignment.load(args.model, device=args.device, dtype=args.dtype, allow_urls=args.allow_urls)
        with Engine(pipe, settings.engine) as engine:
            app = create_app(engine, settings)
            _greet(address(socket), pipe.name, any(getattr(r, "path", "") == "/ui" for r in app.routes), settings)
            uvicorn.Server(configure(app, settings, log_level="warning" if args.quiet else "info")).run([socket])
    return 0


def _settings(args: argparse.Namespace) -> ServerSettings:
    from unialignment.serving.requests import EngineSettings
    from unialignment.serving.settings import ServerSettings, keys_from

    for name in ("max_queue", "max_rows", "max_steps", "max_n", "max_body_mib", "timeout", "memory_mib", "replicas"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise InputError(f"--{name.replace('_', '-')} must be above 0, got {value}")
    if not 0 <= args.port <= 65535:
        raise InputError(f"--port must be 0 to 65535, got {args.port}")
    engine = common.given(
        max_queue=args.max_queue, max_rows=args.max_rows, max_steps=args.max_steps, timeout=args.timeout,
        memory_bytes=None if args.memory_mib is None else args.memory_mib * 2**20,
        max_samples=None if args.max_n is None else max(args.max_n, EngineSettings.max_samples),
    )  # fmt: skip
    server = common.given(
        max_n=args.max_n, max_body_bytes=None if args.max_body_mib is None else args.max_body_mib * 2**20
    )
    keys = (*args.api_key, *keys_from(os.environ))
    if any(not key.strip() for key in keys):
        raise InputError("an API key must not be empty")
    return ServerSettings(
        host=args.host, port=args.port, api_keys=keys, aliases=tuple(args.alias), allow_urls=args.allow_urls,
        web=not args.no_web, engine=EngineSettings(**engine), **server,
    )  # fmt: skip


def _serve_with_ray(args: argparse.Namespace, settings: ServerSettings) -> int:
    from unialignment.serving.ray_app import RayArguments, start

    if args.api_key:
        # Replicas of the HTTP side read keys from their environment, never from arguments that dashboards show.
        os.environ["UNIALIGN_API_KEYS"] = ",".join(settings.api_keys)
    mine = {field.name for field in fields(settings)} - {"host", "port", "api_keys", "web", "engine"}
    start(
        RayArguments(
            model=args.model, device=args.device, dtype=args.dtype, replicas=args.replicas, web=settings.web,
            engine={field.name: getattr(settings.engine, field.name) for field in fields(settings.engine)},
            server={name: getattr(settings, name) for name in sorted(mine)},
        ),
        settings.host, settings.port,
    )  # fmt: skip
    return 0


def _greet(url: str, name: str, web: bool, settings: ServerSettings) -> None:
    page = f"page {url}/ui, " if web else ""
    keys = f"{len(settings.api_keys)} key(s)" if settings.api_keys else "no key needed"
    print(f"{name}: {page}API {url}/v1 ({keys}), documentation {url}/docs", file=sys.stderr, flush=True)
    if not settings.api_keys and settings.host not in ("127.0.0.1", "localhost", "::1"):
        print("warning: reachable from other machines without a key; set UNIALIGN_API_KEYS", file=sys.stderr)
