"""Models behind an OpenAI-compatible server as contestants: pictures by its image endpoints, texts by its chat.

Knows nothing of benchmarks but the items that it is given.
"""

from __future__ import annotations

import base64
import io
from typing import Any

from PIL import Image

from unialignment.errors import InputError
from unialignment.evaluation.benchmarks import Item
from unialignment.evaluation.judges import JudgeOptions, JudgeRejected, JudgeUnavailable
from unialignment.evaluation.judges.endpoint import EndpointJudge
from unialignment.images import load_image

RETRIES = 5
TIMEOUT = 600.0
"""Seconds to wait for a picture."""


class EndpointModel:
    """One model behind one endpoint.

    Args:
        model: Name that the endpoint knows it by.
        url: Base URL ending in ``/v1``; ``OPENAI_BASE_URL`` or OpenAI's unless given.
        options: Settings sent along with requests for pictures (``num_inference_steps``, ``guidance_scale``), for
            servers that know them.

    Raises:
        InputError: The client is not installed or there is no key.
    """

    def __init__(self, model: str, url: str | None = None, options: dict[str, Any] | None = None) -> None:
        self.model, self.options = model, options or {}
        self._chat = EndpointJudge(model, url, JudgeOptions(in_flight=1, retries=RETRIES))
        self._client = self._chat.client.with_options(max_retries=RETRIES, timeout=TIMEOUT)

    def identity(self) -> dict[str, Any]:
        """See :class:`~unialignment.evaluation.harness.Model`. What the server runs behind the name it doesn't say."""
        return {"kind": "openai", "model": self.model, "url": self._chat.url, "settings": self.options}

    def draw(self, item: Item, seed: int) -> tuple[Image.Image, dict[str, Any]]:
        """See :class:`~unialignment.evaluation.harness.Model`.

        Raises:
            InputError: The server does not do this one item.
            JudgeUnavailable: It can't be reached; what is drawn is kept.
        """
        picture = None if item.kind == "generate" or item.photo is None else load_image(item.photo)
        for text in item.turns:
            picture = self._picture(text, picture, seed)
        assert picture is not None
        return picture, {}

    def _picture(self, text: str, source: Image.Image | None, seed: int) -> Image.Image:
        import openai

        request: dict[str, Any] = {"model": self.model, "prompt": text, "n": 1}
        request["extra_body"] = {"seed": seed, **self.options}
        if not self.model.startswith("gpt-image"):  # those send nothing else, and refuse to be asked
            request["response_format"] = "b64_json"
        try:
            if source is None:
                response = self._client.images.generate(**request)
            else:
                buffer = io.BytesIO()
                source.save(buffer, format="PNG")
                response = self._client.images.edit(image=("image.png", buffer.getvalue(), "image/png"), **request)
        except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
            raise JudgeUnavailable(f"{self.model} at {self._chat.url} refuses: {_reason(error)}") from error
        except openai.APIStatusError as error:
            if error.status_code in (408, 409, 429) or error.status_code >= 500:
                raise JudgeUnavailable(f"{self.model} at {self._chat.url} fails: {_reason(error)}") from error
            raise InputError(f"{self.model} refuses this item: {_reason(error)}") from error
        except openai.APIError as error:
            raise JudgeUnavailable(f"{self.model} at {self._chat.url} can't be reached: {_reason(error)}") from error
        encoded = response.data[0].b64_json if response.data else None
        if not encoded:
            raise InputError(f"{self.model} sent no picture as b64_json; pictures behind URLs are not fetched")
        return load_image(base64.b64decode(encoded))

    def tell(self, picture: Image.Image, question: str, hint: str, seed: int) -> str:
        """See :class:`~unialignment.evaluation.reading.Reader`.

        Raises:
            InputError: The server does not answer this one question.
            JudgeUnavailable: It can't be reached; what is answered is kept.
        """
        text = "\n".join(part for part in (question or "Describe the picture.", hint) if part)
        try:
            return self._chat.ask(text, [picture], 0).text.strip()
        except JudgeRejected as error:
            raise InputError(f"{self.model} refuses this question: {error}") from error


def _reason(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
