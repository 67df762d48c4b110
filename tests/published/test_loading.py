"""The published pipeline folder: every task runs as published; whatever is wrong with a folder is said, in one line."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image
from safetensors.torch import load_file, save_file

import unialignment
from unialignment.errors import CheckpointError, InputError
from unialignment.model.published import (
    LoadOptions,
    load_mask_embedding,
    load_published,
    load_t5_tokenizer,
    scheduler_shift,
)
from unialignment.model.transformer import UniAlignmentTransformer
from unialignment.pipeline import UniAlignmentPipeline

WEIGHTS = {
    "transformer": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}


@pytest.fixture(scope="module")
def pipe(published_folder: Path) -> UniAlignmentPipeline:
    return unialignment.load(published_folder)


@pytest.fixture
def folder(tmp_path: Path, published_folder: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(published_folder, tmp_path / "model"))


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))


def every_task(pipe: UniAlignmentPipeline, picture: Image.Image) -> dict[str, object]:
    """Results of all tasks, pictures as arrays."""
    options = {"seed": 1, "num_inference_steps": 2}
    short = {**options, "max_length": 10}
    drawn = {
        "generate": pipe.generate("a red dog", **options),
        "edit": pipe.edit("replace the dog by a cat", picture, **options),
        "perceive": pipe.perceive(picture, kind="segment", of="the dog", **options),
        "control": pipe.control("a dog", picture, kind="depth", **options),
        "compose": pipe.compose("a dog next to a cat", [picture, picture.rotate(90)], **options),
    }
    written = {
        "caption": pipe.caption(picture, **short),
        "answer": pipe.answer(picture, "what is next to the dog", **short),
        "infill": pipe.infill(picture, "a ___ dog with ___ apple", **short),
        "rewrite": pipe.rewrite("a dog next to a cat", **short),
    }
    return {
        **{task: np.asarray(result.images[0]) for task, result in drawn.items()},
        **{task: result.texts[0] for task, result in written.items()},
    }


# -------------------------------------------------------------------------------------------------------- what is right


def test_every_task_runs_is_saved_and_loaded(pipe: UniAlignmentPipeline, picture: Image.Image, tmp_path: Path) -> None:
    first = every_task(pipe, picture)
    assert set(first) == set(pipe.tasks.names) and len(first) == 9
    assert first["infill"].startswith("a") and "dog with" in first["infill"]
    assert not np.array_equal(first["generate"], first["edit"])
    pipe.save_pretrained(tmp_path / "ours")
    again = unialignment.load(tmp_path / "ours")
    assert again.sampling == pipe.sampling and again.text_limit == pipe.text_limit
    for task, value in every_task(again, picture).items():
        assert np.array_equal(value, first[task]), task


def test_the_parts_are_those_of_the_folder(pipe: UniAlignmentPipeline, published_folder: Path) -> None:
    mask = torch.load(published_folder / "mask_token_emb_00001.pth", weights_only=True)
    assert torch.equal(pipe.text_embedder.mask_embedding, mask)
    for module, name in (
        (pipe.transformer, "transformer"),
        (pipe.autoencoder.autoencoder, "vae"),
        (pipe.text_embedder.encoder, "text_encoder"),
    ):
        state = load_file(published_folder / name / WEIGHTS[name])
        assert all(torch.equal(module.state_dict()[key], value) for key, value in state.items()), name
    assert pipe.transformer.config.attention_mode == "joint" and pipe.initialisation is None
    assert pipe.sampling["generate"]["shift"] == 3.0
    assert (pipe.tokenizer.pad_token_id, pipe.tokenizer.eos_token_id, pipe.tokenizer.mask_token_id) == (0, 1, 123)
    for part in (pipe.transformer, pipe.autoencoder, pipe.text_embedder):
        assert not any(module.training for module in part.modules())
        assert not any(value.is_meta for value in part.state_dict().values())


def test_prompts_are_padded_and_the_padding_is_seen(pipe: UniAlignmentPipeline) -> None:
    condition = pipe.condition(["a red dog", ""])
    ids = torch.zeros(2, 256, dtype=torch.long)
    ids[0, :4] = torch.tensor([4, 9, 6, 1])
    ids[1, 0] = 1
    assert bool(condition.mask.all())
    with torch.no_grad():
        torch.testing.assert_close(condition.text, pipe.text_embedder.encoder(ids).last_hidden_state)
    with pytest.raises(InputError, match="too long"):
        pipe.generate("dog " * 300)


def test_a_question_leads_the_text_and_all_of_it_is_embedded_at_every_step(
    pipe: UniAlignmentPipeline, picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    embedded: list[torch.Tensor] = []
    embed = pipe.text_embedder.embed
    monkeypatch.setattr(pipe.text_embedder, "embed", lambda ids, mask=None: embedded.append(ids) or embed(ids, mask))
    lengths: list[int] = []
    forward = pipe.transformer._joint

    def joint(*args: object) -> object:
        lengths.append(0 if args[3] is None else args[3].shape[1])  # type: ignore[attr-defined]
        return forward(*args)

    monkeypatch.setattr(pipe.transformer, "_joint", joint)
    pipe.answer(picture, "what is red", seed=0, num_inference_steps=3, max_length=5)
    question = pipe.tokenizer.encode(["what is red"])[0][0]
    assert len(embedded) == 3 and lengths == [0, 0, 0]
    for ids in embedded:
        assert ids.shape == (1, len(question) + 5) and torch.equal(ids[0, : len(question)], question)
    assert bool((embedded[0][0, len(question) :] == pipe.tokenizer.mask_token_id).all())
    assert not torch.equal(embedded[0], embedded[1])
    embedded.clear()
    pipe.caption(picture, seed=0, num_inference_steps=1, max_length=5)
    assert [tuple(ids.shape) for ids in embedded] == [(1, 5)]
    with pytest.raises(InputError, match="leave guidance_scale at 1"):
        pipe.answer(picture, "what is red", guidance_scale=2.0)


def test_a_batch_equals_its_singles(pipe: UniAlignmentPipeline, picture: Image.Image) -> None:
    options = {"seed": 0, "num_inference_steps": 2, "max_length": 6}
    questions = ["what is red", "what is next to the dog", "is the cat blue"]
    together = pipe.answer(picture, questions, **options).texts
    assert together == [pipe.answer(picture, question, **options).texts[0] for question in questions]
    assert len(set(together)) > 1


def test_embeddings_of_both_kinds(pipe: UniAlignmentPipeline, picture: Image.Image) -> None:
    assert pipe.embed_image(picture).shape == pipe.embed_text("a dog").shape == (1, 64)


def test_half_precision(published_folder: Path, picture: Image.Image) -> None:
    pipe = unialignment.load(published_folder, dtype="bfloat16")
    assert pipe.dtype == next(pipe.text_embedder.encoder.parameters()).dtype == torch.bfloat16
    assert next(pipe.autoencoder.parameters()).dtype == torch.float32
    assert set(every_task(pipe, picture)) == set(pipe.tasks.names)


def test_an_index_is_not_needed(folder: Path) -> None:
    (folder / "model_index.json").unlink()
    assert unialignment.load(folder).transformer.config.num_layers == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_either_name_of_the_tied_table_will_do(folder: Path, dtype: torch.dtype) -> None:
    path = folder / "text_encoder" / "model.safetensors"
    state = load_file(path)
    table = state.pop("shared.weight")
    for names in (["encoder.embed_tokens.weight"], ["encoder.embed_tokens.weight", "shared.weight"]):
        save_file({**state, **{name: table.clone() for name in names}}, path)
        encoder = load_published(folder, LoadOptions(dtype)).components["text_embedder"].encoder
        assert encoder.get_input_embeddings() is encoder.shared
        assert encoder.encoder.get_input_embeddings() is encoder.shared
        assert torch.equal(encoder.shared.weight, table.to(dtype))


@pytest.mark.parametrize(
    ("config", "shift"),
    [
        ({"shift": 3.0}, 3.0),
        ({}, 1.0),
        ({"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}, np.exp(0.5)),
    ],
)
def test_shift_of_the_scheduler(tmp_path: Path, config: dict[str, object], shift: float) -> None:
    text = json.dumps({"_class_name": "FlowMatchEulerDiscreteScheduler", **config})
    (tmp_path / "scheduler_config.json").write_text(text)
    assert scheduler_shift(tmp_path, 256) == pytest.approx(shift)


def test_stored_padding_and_truncation_are_undone(folder: Path) -> None:
    path = folder / "tokenizer" / "tokenizer.json"
    data = json.loads(path.read_text())
    data["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    data["padding"] = {
        **{"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None},
        **{"pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>"},
    }
    path.write_text(json.dumps(data))
    assert load_t5_tokenizer(folder / "tokenizer").encode(["a red dog on a cat"])[0].shape == (1, 7)


def test_tokenizers_without_sentinels(folder: Path) -> None:
    path = folder / "tokenizer" / "tokenizer.json"
    path.write_text(path.read_text().replace("<extra_id_", "<other_"))
    assert load_t5_tokenizer(folder / "tokenizer", 130).mask_token_id == 124
    refused(folder, "no <extra_id_0>, the mask")
    change(folder / "tokenizer" / "tokenizer_config.json", mask_token="<other_2>")
    assert load_t5_tokenizer(folder / "tokenizer").mask_token_id == 121


# -------------------------------------------------------------------------------------------------------- what is wrong


def refused(folder: Path, *words: str) -> None:
    """The folder is refused in one line that holds all words."""
    with pytest.raises(CheckpointError) as caught:
        unialignment.load(folder)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    ("file", "values", "words"),
    [
        ("model_index.json", {"transformer": ["diffusers", "Mystery"]}, ("Mystery", "SD3JointModelFlexible")),
        ("model_index.json", {"transformer": None}, ("no usable transformer",)),
        ("transformer/config.json", {"_class_name": "FluxTransformer2DModel"}, ("FluxTransformer2DModel", "expected")),
        ("transformer/config.json", {"_class_name": None}, ("None", "expected")),
        ("vae/config.json", {"_class_name": "AutoencoderDC"}, ("AutoencoderDC", "expected AutoencoderKL")),
        (
            "text_encoder/config.json",
            {"architectures": ["CLIPTextModel"]},
            ("CLIPTextModel", "expected T5EncoderModel"),
        ),
        ("text_encoder/config.json", {"model_type": "umt5"}, ("umt5", "expected a T5")),
        ("scheduler/scheduler_config.json", {"_class_name": "DDIMScheduler"}, ("DDIMScheduler", "flow-matching")),
    ],
)
def test_unknown_classes(folder: Path, file: str, values: dict[str, object], words: tuple[str, ...]) -> None:
    change(folder / file, **values)
    refused(folder, *words)


@pytest.mark.parametrize(
    ("file", "values", "words"),
    [
        ("transformer/config.json", {"num_layers": 4}, ("missing", "transformer_blocks.3.")),
        ("transformer/config.json", {"num_layers": 2}, ("unexpected", "transformer_blocks.2.")),
        ("transformer/config.json", {"num_attention_heads": 2, "caption_projection_dim": 32}, ("of another shape",)),
        ("transformer/config.json", {"qk_norm": "rms_norm"}, ("missing", "norm_added_k")),
        ("transformer/config.json", {"num_layers": "three"}, ("doesn't describe a transformer",)),
        ("text_encoder/config.json", {"num_layers": 3}, ("missing", "encoder.block.2.")),
        ("text_encoder/config.json", {"d_ff": 32}, ("of another shape",)),
        ("vae/config.json", {"block_out_channels": [8, 8, 8, 16]}, ("of another shape",)),
        ("vae/config.json", {"latent_channels": 16}, ("16 latent channels", "transformer 4")),
    ],
)
def test_wrong_architectures(folder: Path, file: str, values: dict[str, object], words: tuple[str, ...]) -> None:
    change(folder / file, **values)
    refused(folder, *words)


def test_stable_diffusion_under_the_published_name(folder: Path) -> None:
    path = folder / "transformer" / WEIGHTS["transformer"]
    state = load_file(path)
    save_file({name: value for name, value in state.items() if not name.startswith("text_proj_out")}, path)
    refused(folder, "text_proj_out.weight", "missing")


@pytest.mark.parametrize("component", [*WEIGHTS, "tokenizer", "scheduler"])
def test_a_missing_component(folder: Path, component: str) -> None:
    shutil.rmtree(folder / component)
    refused(folder, component, "incomplete")


@pytest.mark.parametrize("component", WEIGHTS)
def test_truncated_weights(folder: Path, component: str) -> None:
    path = folder / component / WEIGHTS[component]
    os.truncate(path, path.stat().st_size - 100)
    refused(folder, path.name, "truncated")
    path.unlink()
    refused(folder, component, "no weights", "incomplete")


@pytest.mark.parametrize("component", WEIGHTS)
def test_an_index_without_its_shard(folder: Path, component: str) -> None:
    path = folder / component / WEIGHTS[component]
    state = load_file(path)
    names = [path.name.replace(".safetensors", f"-{i:05d}-of-00002.safetensors") for i in (1, 2)]
    where = {name: names[index % 2] for index, name in enumerate(state)}
    for shard in names:
        save_file({name: value for name, value in state.items() if where[name] == shard}, path.with_name(shard))
    path.unlink()
    path.with_name(f"{path.name}.index.json").write_text(json.dumps({"weight_map": where}))
    unialignment.load(folder)
    path.with_name(names[1]).unlink()
    refused(folder, names[1], "the download is incomplete")


@pytest.mark.parametrize("component", WEIGHTS)
def test_one_tensor_too_few(folder: Path, component: str) -> None:
    path = folder / component / WEIGHTS[component]
    state = load_file(path)
    lost = sorted(state)[0]
    save_file({name: value for name, value in state.items() if name != lost}, path)
    refused(folder, lost, "1 missing")


def test_pickled_weights(folder: Path) -> None:
    path = folder / "transformer" / WEIGHTS["transformer"]
    torch.save(load_file(path), path.with_name("diffusion_pytorch_model.bin"))
    path.unlink()
    refused(folder, "diffusion_pytorch_model.bin", "can run code")


def test_a_text_encoder_of_another_width(tmp_path: Path, folder: Path, make_text_encoder: Callable[..., None]) -> None:
    shutil.rmtree(folder / "text_encoder")
    make_text_encoder(folder / "text_encoder", width=32)
    refused(folder, "32 wide", "expects 48")


def test_a_tokenizer_of_another_size(folder: Path, make_tokenizer: Callable[..., int]) -> None:
    shutil.rmtree(folder / "tokenizer")
    make_tokenizer(folder / "tokenizer", size=110)
    assert unialignment.load(folder).tokenizer.vocab_size == 124  # a head with room to spare, as T5's 32128
    shutil.rmtree(folder / "tokenizer")
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer_config.json").write_text("{}")
    refused(folder, "tokenizer.json", "incomplete")
    (folder / "tokenizer" / "tokenizer.json").write_text("{half")
    refused(folder, "cannot load a tokenizer")


def test_a_text_head_that_its_neighbours_do_not_fit(folder: Path, make_transformer: Callable[..., None]) -> None:
    shutil.rmtree(folder / "transformer")
    make_transformer(folder / "transformer", vocab_size=97)
    refused(folder, "124 tokens", "text head 97")
    shutil.rmtree(folder / "transformer")
    make_transformer(folder / "transformer", vocab_size=200)
    refused(folder, "text head 200", "text encoder 160")


class Code:
    """What a malicious pickle holds."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.marker,)


def test_code_in_the_mask_embedding_is_never_run(folder: Path, tmp_path: Path) -> None:
    marker, path = tmp_path / "ran", folder / "mask_token_emb_00001.pth"
    for value in (Code(marker), {"embedding": torch.zeros(48), "extra": Code(marker)}, [Code(marker)]):
        torch.save(value, path)
        refused(folder, path.name, "may be code", "refused")
        assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists()  # it would have run


def test_a_transformer_alone_is_no_pipeline(folder: Path) -> None:
    for part in folder.iterdir():
        if part.name != "transformer":
            shutil.rmtree(part) if part.is_dir() else part.unlink()
    refused(folder, "a transformer alone", "UniAlignmentTransformer.from_pretrained")
    refused(folder / "transformer", "a transformer alone", "UniAlignmentTransformer.from_pretrained")


def test_a_missing_mask_embedding(folder: Path) -> None:
    (folder / "mask_token_emb_00001.pth").unlink()
    refused(folder, "no mask_token_emb*.pth")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.zeros(32), ("width 48", "[32]")),
        (torch.zeros(48, dtype=torch.long), ("width 48",)),
        ({"a": torch.zeros(48), "b": torch.zeros(48)}, ("got a dict",)),
        ("text", ("got a str",)),
    ],
)
def test_unusable_mask_embeddings(folder: Path, value: object, words: tuple[str, ...]) -> None:
    torch.save(value, folder / "mask_token_emb_00001.pth")
    refused(folder, "mask_token_emb_00001.pth", *words)


def test_a_damaged_mask_embedding(folder: Path) -> None:
    path = folder / "mask_token_emb_00001.pth"
    os.truncate(path, path.stat().st_size // 2)
    refused(folder, path.name, "damaged")


def test_forms_of_the_mask_embedding(folder: Path) -> None:
    path = folder / "mask_token_emb_00001.pth"
    vector = load_mask_embedding(folder, 48)
    for value in (vector.view(1, 48), {"weight": vector}, torch.nn.Parameter(vector)):
        torch.save(value, path)
        assert torch.equal(load_mask_embedding(folder, 48), vector)
    shutil.copyfile(path, folder / "transformer" / path.name)
    assert torch.equal(load_mask_embedding(folder, 48), vector)
    torch.save(vector + 1, path)
    with pytest.raises(CheckpointError, match="differ"):
        load_mask_embedding(folder, 48)


def test_another_kind_of_scheduler(folder: Path) -> None:
    DDIMScheduler().save_pretrained(folder / "scheduler")
    refused(folder, "DDIMScheduler")


# --------------------------------------------------------------------------------------------------- other ways to load


@pytest.mark.parametrize("options", [{"drop_text_encoder": True}, {"max_memory": "8GiB"}, {"quantize": "8bit"}])
@pytest.mark.parametrize("component", ["transformer", "text_encoder", "vae"])
def test_truncation_is_found_at_once_in_every_way_of_loading(
    folder: Path, component: str, options: dict[str, object]
) -> None:
    """Also where the transformer's weights aren't read before they are needed."""
    if "quantize" in options:
        pytest.importorskip("optimum.quanto")
    path = folder / component / WEIGHTS[component]
    os.truncate(path, path.stat().st_size - 100)
    with pytest.raises(CheckpointError, match="truncated"):
        unialignment.load(folder, device="cpu", **options)


def test_our_layout_with_t5_is_as_strict(pipe: UniAlignmentPipeline, tmp_path: Path) -> None:
    """Without checksums, as after somebody's own conversion."""
    pipe.save_pretrained(tmp_path / "ours")
    for damage, message in (
        (lambda at: os.truncate(at / "model.safetensors", 5000), "truncated"),
        (lambda at: (at / "mask_embedding.safetensors").unlink(), "mask_embedding"),
        (lambda at: _drop_tensor(at / "model.safetensors"), "1 missing"),
        (lambda at: _set(at / "config.json", d_model=64), "weights|wide"),
        (lambda at: save_file({"mask_embedding": torch.zeros(48)}, at / "mask_embedding.safetensors"), "its token"),
    ):
        copy = Path(shutil.copytree(tmp_path / "ours", tmp_path / "copy"))
        (copy / "checksums.json").unlink()
        damage(copy / "text_embedder")
        with pytest.raises(CheckpointError, match=message):
            unialignment.load(copy, device="cpu")
        shutil.rmtree(copy)


def test_what_is_fetched_of_a_hub_s_repository(hub: list[dict[str, object]]) -> None:
    """A `*` of the hub goes through folders, so each file is asked for as the hub's own client does."""
    from huggingface_hub.utils import filter_repo_objects

    files = {
        "published": ["model_index.json", "mask_token_emb_00001.pth", "transformer/mask_token_emb.pth"],
        "weights": ["transformer/a.safetensors", "vae/a.safetensors", "text_encoder/model-00001-of-00002.safetensors"],
        "sd3": ["text_encoder_3/model.safetensors", "tokenizer_3/spiece.model", "transformer/config.json"],
        "ours": ["text_embedder/mask_embedding.safetensors", "published/transformer/training_only.safetensors"],
    }
    useless = [
        *("sd3.5_medium.safetensors", "text_encoders/t5xxl_fp16.safetensors", "text_encoder_2/model.safetensors"),
        *("text_encoder_3/model.fp16-00001-of-00002.safetensors", "transformer/model.bin", "transformer/model.pth"),
    ]
    unialignment.load("owner/tiny", device="cpu")
    allowed, ignored = hub[-1]["allow_patterns"], hub[-1]["ignore_patterns"]
    every = [file for group in files.values() for file in group]
    found = filter_repo_objects([*every, *useless], allow_patterns=allowed, ignore_patterns=ignored)  # type: ignore[arg-type]
    assert list(found) == every
    UniAlignmentTransformer.from_pretrained("owner/tiny", subfolder="transformer")
    allowed = hub[-1]["allow_patterns"]
    assert list(filter_repo_objects(every, allow_patterns=allowed)) == [  # type: ignore[arg-type]
        file for file in every if file.startswith("transformer/")
    ]


def _drop_tensor(path: Path) -> None:
    state = load_file(path)
    state.pop(sorted(state)[0])
    save_file(state, path, metadata={"format": "pt"})


def _set(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


# ------------------------------------------------------------------------------------------------------------- hub ids


@pytest.fixture
def hub(published_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, object]]:
    """A hub with one repository, ``owner/tiny``; what was asked of it."""
    asked: list[dict[str, object]] = []

    def snapshot(repo_id: str, **options: object) -> str:
        asked.append({"repo_id": repo_id, **options})
        if repo_id != "owner/tiny":
            raise OSError("404: no such repository")
        return str(tmp_path / "snapshot")

    shutil.copytree(published_folder, tmp_path / "snapshot")
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    return asked


def test_hub_ids_are_checked_like_folders(hub: list[dict[str, object]], published_folder: Path, tmp_path: Path) -> None:
    expected = UniAlignmentTransformer.from_pretrained(published_folder, subfolder="transformer").state_dict()
    model = UniAlignmentTransformer.from_pretrained("owner/tiny", subfolder="transformer", revision="v1", token="t")
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert (hub[0]["repo_id"], hub[0]["revision"], hub[0]["token"]) == ("owner/tiny", "v1", "t")
    assert all(str(pattern).startswith("transformer/") for pattern in hub[0]["allow_patterns"])  # type: ignore[attr-defined]
    assert len(unialignment.load("owner/tiny", device="cpu").tasks.names) == 9
    folder = tmp_path / "snapshot" / "transformer"
    _drop_tensor(folder / WEIGHTS["transformer"])
    with pytest.raises(CheckpointError, match="1 missing"):
        UniAlignmentTransformer.from_pretrained("owner/tiny", subfolder="transformer")
    _set(folder / "config.json", _class_name="FluxTransformer2DModel")
    with pytest.raises(CheckpointError, match="FluxTransformer2DModel"):
        UniAlignmentTransformer.from_pretrained("owner/tiny", subfolder="transformer")
    with pytest.raises(CheckpointError, match="404"):
        UniAlignmentTransformer.from_pretrained("owner/other")
    for nothing in ("no such folder", tmp_path / "absent"):
        with pytest.raises(CheckpointError, match="no folder"):
            UniAlignmentTransformer.from_pretrained(nothing)
    assert [entry["repo_id"] for entry in hub[-1:]] == ["owner/other"]
