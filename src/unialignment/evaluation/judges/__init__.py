"""Judges: anything that looks at pictures and answers a text. Knows nothing of benchmarks or scores.

A judge is named ``openai:MODEL``, ``openai:MODEL@http://host:port/v1`` or ``local:FOLDER-OR-HUB-ID``; ``LABEL=`` before
that gives it a name of its own, which tells two endpoints with a model of the same name apart.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from unialignment.errors import InputError, UniAlignmentError


@dataclass(frozen=True)
class Answer:
    """What a judge said.

    Attributes:
        text: The answer.
        refused: The endpoint itself marks it as declined.
        cached: It had been given before and was not asked for again.
        tokens: Tokens that it cost, as the judge counts them.
    """

    text: str
    refused: bool = False
    cached: bool = False
    tokens: int = 0


class JudgeUnavailable(UniAlignmentError, RuntimeError):
    """The judge can't be reached or a budget is used up: nothing is wrong with the item, it can be judged later."""


class JudgeRejected(Exception):
    """The judge does not take this request, now or later (too large, malformed); the item is reported as failed."""


class Judge(Protocol):
    """Anything that answers.

    Attributes:
        name: Unique within a run; used in records and file names.
        in_flight: How many :meth:`ask` calls may run at once.
    """

    name: str
    in_flight: int

    def identity(self) -> dict[str, Any]:
        """Everything that decides its answers, JSON-serialisable, without secrets."""
        ...

    def ask(self, prompt: str, images: Sequence[Image.Image], attempt: int) -> Answer:
        """Answer a prompt about pictures; thread-safe.

        Args:
            prompt: The text.
            images: RGB pictures, in the order that the text speaks of them.
            attempt: 0 at first; later attempts may answer differently.

        Raises:
            JudgeUnavailable: The run should stop; it can be resumed.
            JudgeRejected: This one request will never be answered.
        """
        ...


@dataclass(frozen=True)
class JudgeOptions:
    """Settings of judges.

    Attributes:
        in_flight: Requests at once (endpoints).
        max_requests: Stop after this many requests in this process; ``None``: no limit.
        max_tokens_total: Stop after this many tokens in this process; ``None``: no limit.
        answer_tokens: Longest answer.
        timeout: Seconds to wait for one answer.
        retries: How often a request is sent again after a failure of the connection or the server.
        backoff: Seconds before the first of these, doubled each time.
        cache: Folder of answers given before; ``None``: none.
        temperature: Of first attempts; ``None`` leaves it to the judge. Later attempts use 0.7 at least.
    """

    in_flight: int = 4
    max_requests: int | None = None
    max_tokens_total: int | None = None
    answer_tokens: int = 512
    timeout: float = 120.0
    retries: int = 5
    backoff: float = 1.0
    cache: Path | None = None
    temperature: float | None = 0.0


def build(spec: str, options: JudgeOptions | None = None, device: str | None = None) -> Judge:
    """Make the judge that a name stands for.

    Raises:
        InputError: The name is of no known form, or a needed package is missing.
    """
    options = options or JudgeOptions()
    if match := re.fullmatch(r"([\w.-]+)=((?:openai|local):.+)", spec):
        labelled = build(match.group(2), options, device)
        labelled.name = match.group(1)
        return labelled
    kind, _, rest = spec.partition(":")
    if kind == "openai" and rest:
        from unialignment.evaluation.judges.endpoint import EndpointJudge

        model, url = rest, None
        if match := re.fullmatch(r"(.+)@(https?://.+)", rest):
            model, url = match.groups()
        return EndpointJudge(model, url, options)
    if kind == "local" and rest:
        from unialignment.evaluation.judges.local import LocalJudge

        return LocalJudge(rest, options, device)
    raise InputError(f"unknown judge {spec!r}; expected openai:MODEL, openai:MODEL@http://host/v1 or local:FOLDER")


def folder_name(name: str) -> str:
    """A judge's name as a file system takes it."""
    return re.sub(r"[^\w.-]+", "-", name)


def names(judges: Sequence[Judge]) -> list[str]:
    """Names of judges.

    Raises:
        InputError: The records of two would be in the same folder.
    """
    found = [judge.name for judge in judges]
    taken: dict[str, str] = {}
    for name in found:
        if other := taken.get(folder_name(name).casefold()):
            raise InputError(
                f"two judges would be called alike ({other}, {name}); give one a label: --judge LABEL=openai:MODEL@URL"
            )
        taken[folder_name(name).casefold()] = name
    return found
