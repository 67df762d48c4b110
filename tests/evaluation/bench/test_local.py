"""A judge of ``transformers`` in this process: tiny random models with their own processors and chat templates.

Qwen2.5-VL's processor needs torchvision; where that is missing a LLaVA goes through the same classes alone.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessor,
)

from unialignment.errors import InputError
from unialignment.evaluation.judges import JudgeOptions, build

SPECIAL = ["[pad]", "[eos]", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", "<image>"]
WORDS = ["[unk]", "rate", "the", "picture", "user", "assistant", "8", "7", "{", "}", "score", ":", ",", '"', "[", "]"]
VOCABULARY = {word: index for index, word in enumerate([*SPECIAL, *WORDS])}
TEXT: dict[str, Any] = {
    "vocab_size": len(VOCABULARY), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 256, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 1,
}  # fmt: skip


def template(picture: str) -> str:
    return (
        "{% for m in messages %}{{ m.role }} {% for c in m.content %}{% if c.type == 'image' %}"
        + picture
        + "{% else %} {{ c.text }}{% endif %}{% endfor %} [eos] {% endfor %}"
        "{% if add_generation_prompt %}assistant {% endif %}"
    )


def tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel(VOCABULARY, unk_token="[unk]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"pad_token": "[pad]", "unk_token": "[unk]", "eos_token": "[eos]"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, additional_special_tokens=SPECIAL[2:], **names)


def llava(folder: Path, chat: bool = True) -> None:
    processor = LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        tokenizer(),
        patch_size=16,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template("<image>") if chat else None,
    )
    processor.save_pretrained(folder)
    vision = {"model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 2, "image_size": 32, "patch_size": 16, "projection_dim": 16}
    config = LlavaConfig(
        vision_config=vision, text_config={"model_type": "llama", **TEXT}, image_token_id=VOCABULARY["<image>"]
    )
    save(LlavaForConditionalGeneration(config), folder)


def qwen(folder: Path) -> None:
    from transformers import Qwen2_5_VLProcessor, Qwen2VLVideoProcessor

    Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(min_pixels=56 * 56, max_pixels=84 * 84),
        tokenizer(),
        Qwen2VLVideoProcessor(),
        chat_template=template("<|vision_start|><|image_pad|><|vision_end|>"),
    ).save_pretrained(folder)
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10_000.0}
    vision = {
        "depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 16, "patch_size": 14,
        "window_size": 56, "fullatt_block_indexes": [1],
    }  # fmt: skip
    config = Qwen2_5_VLConfig(
        text_config=TEXT | {"rope_parameters": rope},
        vision_config=vision,
        image_token_id=VOCABULARY["<|image_pad|>"],
        video_token_id=VOCABULARY["<|video_pad|>"],
        vision_start_token_id=VOCABULARY["<|vision_start|>"],
    )
    save(Qwen2_5_VLForConditionalGeneration(config), folder)


def save(model: Any, folder: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # of the usual scale, random weights hardly look at their inputs
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.5, generator=generator)
    model.save_pretrained(folder)


@pytest.fixture(scope="module", params=["llava", "qwen"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "qwen" and importlib.util.find_spec("torchvision") is None:
        pytest.skip("the processor of Qwen2.5-VL needs torchvision")
    path = tmp_path_factory.mktemp("judge") / request.param
    {"llava": llava, "qwen": qwen}[request.param](path)
    return path


def test_it_looks_at_its_pictures(folder: Path) -> None:
    judge = build(f"local:{folder}", JudgeOptions(answer_tokens=3), "cpu")
    red, blue = Image.new("RGB", (70, 60), "red"), Image.effect_noise((60, 90), 90).convert("RGB")
    inputs: list[dict[str, Any]] = []
    generate = judge.model.generate  # type: ignore[attr-defined]

    def spy(**given: Any) -> Any:
        inputs.append(given)
        return generate(**given)

    judge.model.generate = spy  # type: ignore[attr-defined]
    answers = [judge.ask("rate the picture", pictures, 0) for pictures in ([red], [red], [blue], [red, blue], [])]
    assert answers[0] == answers[1]
    assert max(len(answer.text.split()) for answer in answers) <= 3, "the question is part of the answer"
    pads = [VOCABULARY["<image>"], VOCABULARY["<|image_pad|>"]]
    counts = [int(torch.isin(one["input_ids"], torch.tensor(pads)).sum()) for one in inputs]
    assert counts[0] >= 4 and counts[3] > counts[0] and counts[4] == 0
    assert inputs[0]["do_sample"] is False
    with torch.no_grad():
        shown = {name: inputs[0][name] for name in inputs[0] if name not in ("do_sample", "max_new_tokens")}
        first = judge.model(**shown).logits[0, -1]  # type: ignore[attr-defined]
        other = judge.model(**shown | {"pixel_values": shown["pixel_values"] * -1}).logits[0, -1]  # type: ignore[attr-defined]
    assert not torch.allclose(first, other, atol=1e-3)


def test_later_attempts_vary_and_repeat(folder: Path) -> None:
    judge = build(f"local:{folder}", JudgeOptions(answer_tokens=16), "cpu")
    red = [Image.new("RGB", (64, 64), "red")]
    before = torch.random.get_rng_state()
    answers = {attempt: judge.ask("rate", red, attempt).text for attempt in (0, 1, 2)}
    assert len(set(answers.values())) > 1
    again = build(f"local:{folder}", JudgeOptions(answer_tokens=16), "cpu")
    assert {attempt: again.ask("rate", red, attempt).text for attempt in (2, 1, 0)} == answers
    assert torch.equal(before, torch.random.get_rng_state())
    assert judge.identity() == again.identity()


def test_identity_follows_the_weights(tmp_path: Path) -> None:
    llava(tmp_path / "a")
    first = build(f"local:{tmp_path / 'a'}", None, "cpu").identity()
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "a")
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    model.save_pretrained(tmp_path / "a")
    assert build(f"local:{tmp_path / 'a'}", None, "cpu").identity() != first


def test_unusable_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="can't load the judge"):
        build(f"local:{tmp_path}", None, "cpu")
    llava(tmp_path / "silent", chat=False)
    with pytest.raises(InputError, match="no chat template"):
        build(f"local:{tmp_path / 'silent'}", None, "cpu")
