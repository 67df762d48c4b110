"""Requests made up from the OpenAPI document, right and wrong: no 5xx, and only answers that the document names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra 'serve' is not installed")
schemathesis = pytest.importorskip("schemathesis", reason="the extra 'dev' is not installed")

from hypothesis import HealthCheck, Phase, given, seed, settings  # noqa: E402
from schemathesis.checks import not_a_server_error  # noqa: E402
from schemathesis.specs.openapi import checks  # noqa: E402

from unialignment.serving.app import create_app  # noqa: E402
from unialignment.serving.engine import Engine, EngineSettings  # noqa: E402
from unialignment.serving.server import BackgroundServer  # noqa: E402
from unialignment.serving.settings import ServerSettings  # noqa: E402


def not_a_defect(ctx: Any, response: Any, case: Any) -> bool | None:
    """A deadline of a millisecond passes, and saying so is right; any other 5xx is a defect."""
    return None if response.status_code == 504 else not_a_server_error(ctx, response, case)


CHECKS = [
    not_a_defect,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
]
ROUTES = [
    ("/v1/images/generations", "POST"),
    ("/v1/images/edits", "POST"),
    ("/v1/chat/completions", "POST"),
    ("/v1/embeddings", "POST"),
    ("/v1/models", "GET"),
    ("/v1/models/{model}", "GET"),
    ("/healthz", "GET"),
]


@pytest.fixture(scope="module")
def server(make_tiny_pipeline: Any) -> Iterator[BackgroundServer]:
    limits = EngineSettings(max_steps=8, timeout=30.0)
    with (
        Engine(make_tiny_pipeline(), limits) as engine,
        BackgroundServer(create_app(engine, ServerSettings(port=0, web=False, engine=limits))) as running,
    ):
        yield running
        stats = engine.stats()
        assert stats.alive
        assert stats.failed == stats.active == stats.reserved_bytes == 0


@pytest.fixture(scope="module")
def document(server: BackgroundServer) -> Any:
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


def fuzz(document: Any, path: str, method: str, mode: str, examples: int) -> None:
    strategy = document[path][method].as_strategy(schemathesis.GenerationMode(mode))

    @seed(7)
    @settings(
        max_examples=examples, deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(case=strategy)
    def run(case: Any) -> None:
        case.call_and_validate(checks=CHECKS, timeout=60)

    run()


@pytest.mark.parametrize("mode", ["positive", "negative"])
@pytest.mark.parametrize(("path", "method"), ROUTES[:4])
def test_made_up_requests(document: Any, path: str, method: str, mode: str) -> None:
    fuzz(document, path, method, mode, examples=6)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["positive", "negative"])
@pytest.mark.parametrize(("path", "method"), ROUTES)
def test_many_made_up_requests(document: Any, path: str, method: str, mode: str) -> None:
    if mode == "negative" and method == "GET":
        pytest.skip("takes nothing that could be wrong")
    fuzz(document, path, method, mode, examples=120)


def test_every_route_is_documented(document: Any) -> None:
    paths = set(document.raw_schema["paths"])
    assert paths == {path for path, _ in ROUTES} | {"/readyz", "/metrics"}
