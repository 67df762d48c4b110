"""A judge behind an OpenAI-compatible endpoint, through the official client: retries, budget, cache.

Knows nothing of what it is asked.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import math
import os
import random
import threading
import time
from collections.abc import Callable, Sequence
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

from PIL import Image

from unialignment.errors import InputError
from unialignment.evaluation.judges import Answer, JudgeOptions, JudgeRejected, JudgeUnavailable
from unialignment.evaluation.records import digest
from unialignment.storage import write_json

RETRY_TEMPERATURE = 0.7
LONGEST_WAIT = 60.0


class EndpointJudge:
    """One model behind one endpoint.

    Args:
        model: Name that the endpoint knows it by.
        url: Base URL ending in ``/v1``; ``OPENAI_BASE_URL`` or OpenAI's unless given.
        options: Limits.
        sleep: Waits between retries.

    Raises:
        InputError: The client is not installed or there is no key.
    """

    def __init__(
        self,
        model: str,
        url: str | None = None,
        options: JudgeOptions | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        try:
            import openai
        except ModuleNotFoundError as error:
            raise InputError("this judge needs the package openai; run: pip install 'unialignment[eval]'") from error
        self._openai = openai
        self.model, self.options, self._sleep = model, options or JudgeOptions(), sleep
        self.in_flight = max(1, self.options.in_flight)
        key = os.environ.get("OPENAI_API_KEY")
        url = url or os.environ.get("OPENAI_BASE_URL") or None
        if key is None and url is None:
            raise InputError(
                "no key for the judge: set OPENAI_API_KEY, or name an endpoint: openai:MODEL@http://host/v1"
            )
        # Retries are ours, so that they count against the budget and their waits can be tested.
        self._client = openai.OpenAI(api_key=key or "none", base_url=url, timeout=self.options.timeout, max_retries=0)
        self.url = _public(str(self._client.base_url))
        self.name = f"openai:{model}"
        self._lock = threading.Lock()
        self.requests = self.tokens = 0

    @property
    def client(self) -> Any:
        """The client of the endpoint."""
        return self._client

    def identity(self) -> dict[str, Any]:
        """See :class:`~unialignment.evaluation.judges.Judge`."""
        options = self.options
        return {
            "kind": "openai",
            "model": self.model,
            "url": self.url,
            "temperature": options.temperature,
            "answer_tokens": options.answer_tokens,
        }

    def ask(self, prompt: str, images: Sequence[Image.Image], attempt: int) -> Answer:
        """See :class:`~unialignment.evaluation.judges.Judge`."""
        pictures = [_png(image) for image in images]
        key = digest(json.dumps(self.identity(), sort_keys=True), prompt, str(attempt), *pictures)
        if (known := self._known(key)) is not None:
            return known
        content: list[dict[str, Any]] = [{"type": "text", "text": prompt}]
        for data in pictures:
            encoded = f"data:image/png;base64,{base64.b64encode(data).decode()}"
            content.append({"type": "image_url", "image_url": {"url": encoded}})
        request: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": self.options.answer_tokens,
            "seed": attempt,
        }
        if self.options.temperature is not None:
            # The same question at temperature 0 would get the same unusable answer.
            request["temperature"] = max(self.options.temperature, RETRY_TEMPERATURE if attempt else 0.0)
        answer = self._answer(self._send(request))
        self._remember(key, answer)
        return answer

    def _send(self, request: dict[str, Any]) -> Any:
        openai = self._openai
        for trial in range(self.options.retries + 1):
            self._spend()
            try:
                return self._client.chat.completions.create(**request)
            except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
                raise JudgeUnavailable(f"the judge {self.name} at {self.url} refuses: {_reason(error)}") from error
            except openai.APIStatusError as error:
                if error.status_code not in (408, 409, 429) and error.status_code < 500:
                    raise JudgeRejected(_reason(error)) from error
                wait, last = _retry_after(error), error
            except openai.APIError as error:  # connection, timeout, an answer that is not one
                wait, last = None, error
            if trial == self.options.retries:
                raise JudgeUnavailable(
                    f"the judge {self.name} at {self.url} failed {trial + 1} times, at last with: {_reason(last)}; "
                    "what is judged is kept, run the same command again to go on"
                ) from last
            # Jitter, so that requests which failed together are not sent again together.
            self._sleep(min(LONGEST_WAIT, wait or self.options.backoff * 2**trial * random.uniform(0.5, 1.5)))
        raise AssertionError("unreachable")

    def _spend(self) -> None:
        options = self.options
        with self._lock:
            over_requests = options.max_requests is not None and self.requests >= options.max_requests
            over_tokens = options.max_tokens_total is not None and self.tokens >= options.max_tokens_total
            if over_requests or over_tokens:
                raise JudgeUnavailable(
                    f"the budget of the judge {self.name} is used up ({self.requests:,} requests, {self.tokens:,} "
                    "tokens); what is judged is kept, run the same command again to go on"
                )
            self.requests += 1

    def _answer(self, response: Any) -> Answer:
        tokens = int(getattr(response.usage, "total_tokens", 0) or 0) if getattr(response, "usage", None) else 0
        with self._lock:
            self.tokens += tokens
        if not getattr(response, "choices", None):
            return Answer("", tokens=tokens)
        choice = response.choices[0]
        declined = getattr(choice.message, "refusal", None)
        refused = bool(declined) or choice.finish_reason == "content_filter"
        return Answer(choice.message.content or declined or "", refused=refused, tokens=tokens)

    def _known(self, key: str) -> Answer | None:
        if self.options.cache is None:
            return None
        try:
            data = json.loads((self.options.cache / key[:2] / f"{key}.json").read_text(encoding="utf-8"))
            return Answer(str(data["text"]), bool(data["refused"]), cached=True)
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _remember(self, key: str, answer: Answer) -> None:
        if self.options.cache is not None:
            with contextlib.suppress(OSError):  # StorageError is one: a full cache is no reason to lose a judgement
                write_json(
                    self.options.cache / key[:2] / f"{key}.json", {"text": answer.text, "refused": answer.refused}
                )


def _public(url: str) -> str:
    """A URL without what may be secret in it: user, password and query."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.hostname}{f':{parts.port}' if parts.port else ''}{parts.path.rstrip('/')}"


def _reason(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _retry_after(error: Any) -> float | None:
    """Seconds that the endpoint asks to wait: a number or, as HTTP allows, a date."""
    text = str(getattr(error.response, "headers", {}).get("retry-after") or "")
    with contextlib.suppress(ValueError, OverflowError):
        wait = float(text)
        return max(0.0, wait) if math.isfinite(wait) else None
    with contextlib.suppress(ValueError, TypeError, OverflowError):
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    return None


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()
