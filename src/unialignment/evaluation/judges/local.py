"""A vision-language model of ``transformers`` on this machine as a judge. Knows nothing of what it is asked."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from unialignment.errors import InputError
from unialignment.evaluation.judges import Answer, JudgeOptions
from unialignment.evaluation.records import digest


class LocalJudge:
    """Qwen2.5-VL, its successors, and whatever else ``AutoModelForImageTextToText`` loads.

    First attempts decode greedily; later ones sample with the attempt as seed. No code of a model's own is run.

    Args:
        name: Folder or hub id.
        options: Of these ``answer_tokens`` is used.
        device: Where to compute; CUDA if there is some unless given.

    Raises:
        InputError: It can't be loaded.
    """

    in_flight = 1

    def __init__(self, name: str, options: JudgeOptions | None = None, device: str | None = None) -> None:
        import torch
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.options = options or JudgeOptions()
        self.model_name = name
        self.name = f"local:{Path(name).name}"
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = "float32" if self.device == "cpu" else "bfloat16"
        try:
            self.processor: Any = AutoProcessor.from_pretrained(name)
            self.model: Any = AutoModelForImageTextToText.from_pretrained(
                name, dtype=getattr(torch, self.dtype), use_safetensors=True
            )
        except (OSError, ValueError, KeyError, ImportError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise InputError(f"can't load the judge {name!r}: {reason[:200]}; give a folder or hub id") from error
        if getattr(self.processor, "chat_template", None) is None:
            raise InputError(f"the judge {name!r} has no chat template; use an instruction-tuned model")
        parts: list[str | bytes] = [self.model.config.to_json_string(), str(self.processor.chat_template)]
        for key, value in sorted(self.model.state_dict().items()):
            parts += [key, value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()]
        self.fingerprint = digest(*parts)[:16]
        self.model.to(self.device).eval()
        self._lock = threading.Lock()

    def identity(self) -> dict[str, Any]:
        """See :class:`~unialignment.evaluation.judges.Judge`."""
        return {
            "kind": "local",
            "model": self.model_name,
            "fingerprint": self.fingerprint,
            "dtype": self.dtype,
            "answer_tokens": self.options.answer_tokens,
        }

    def ask(self, prompt: str, images: Sequence[Image.Image], attempt: int) -> Answer:
        """See :class:`~unialignment.evaluation.judges.Judge`."""
        import torch

        content: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
        content.append({"type": "text", "text": prompt})
        cuda = [torch.cuda.current_device()] if self.device.startswith("cuda") else []
        with self._lock, torch.inference_mode(), torch.random.fork_rng(devices=cuda):
            inputs = self.processor.apply_chat_template(
                [{"role": "user", "content": content}],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            ).to(self.device)
            sampling: dict[str, Any] = {"do_sample": False}
            if attempt:
                torch.manual_seed(attempt)
                sampling = {"do_sample": True, "temperature": 0.7}
            output = self.model.generate(**inputs, max_new_tokens=self.options.answer_tokens, **sampling)
            answer = output[:, inputs["input_ids"].shape[1] :]
            text = self.processor.batch_decode(answer, skip_special_tokens=True)[0]
        return Answer(text.strip(), tokens=int(output.shape[1]))
