"""Weights that are dropped, offloaded, quantized or adapted: the same results, or the difference that was asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import unialignment
from unialignment.errors import CheckpointError, InputError
from unialignment.memory import MemoryTracker, size_of, tensors_of
from unialignment.model.lora import add_lora, save_lora
from unialignment.model.quantization import backend, is_quantized, parse_quantize
from unialignment.model.text import T5TextEmbedder
from unialignment.pipeline import UniAlignmentPipeline

PICTURE = Image.new("RGB", (64, 64), (200, 30, 60))
QUIET: dict[str, Any] = {"progress": False, "num_inference_steps": 2, "seed": 1}


def load(folder: Path, **options: Any) -> UniAlignmentPipeline:
    return unialignment.load(folder, device="cpu", **options)


def results(pipe: UniAlignmentPipeline) -> list[Any]:
    """A picture from a prompt, one from a picture, a text; bytes and words."""
    drawn = pipe.generate("a red dog", guidance_scale=3.0, **QUIET).images[0]
    edited = pipe.edit("replace the dog by the cat", PICTURE, guidance_scale=3.0, **QUIET).images[0]
    return [drawn.tobytes(), edited.tobytes(), pipe.answer(PICTURE, "what is red", max_length=8, **QUIET).texts]


def same(found: list[Any], wanted: list[Any]) -> bool:
    """Equal texts, and pictures up to rounding: other memory and other batches may sum in another order."""
    pictures = [
        np.abs(np.frombuffer(a, np.uint8).astype(int) - np.frombuffer(b, np.uint8)).max()
        for a, b in zip(found[:2], wanted[:2], strict=True)
    ]
    return max(pictures) <= 2 and found[2:] == wanted[2:]


@pytest.fixture(scope="module")
def expected(published_folder: Path) -> list[Any]:
    return results(load(published_folder))


@pytest.fixture(scope="module")
def lora_file(published_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = load(published_folder).transformer
    add_lora(model, rank=2)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return save_lora(model, tmp_path_factory.mktemp("lora"))


def weights(module: torch.nn.Module) -> int:
    """Bytes of a module's tensors that exist."""
    return size_of(tensor for tensor in tensors_of(module) if tensor.device.type != "meta")


# ------------------------------------------------------------------------------------------------- the text encoder


@pytest.mark.parametrize("layout", ["published", pytest.param("unialignment", marks=pytest.mark.slow)])
def test_a_dropped_text_encoder_comes_back_from_its_folder(
    layout: str, published_folder: Path, expected: list[Any], tmp_path: Path
) -> None:
    folder = published_folder
    if layout == "unialignment":
        folder = tmp_path / "ours"
        load(published_folder).save_pretrained(folder)
    pipe = load(folder, drop_text_encoder=True)
    assert weights(pipe._transformer) == 0 and weights(pipe._text_embedder) > 0  # the prompt comes first
    present: list[tuple[int, int]] = []

    def look(pipe: UniAlignmentPipeline, *_: Any) -> None:
        present.append((weights(pipe._transformer), weights(pipe._text_embedder)))

    drawn = pipe.generate("a red dog", guidance_scale=3.0, callback_on_step_end=look, **QUIET).images[0]
    assert drawn.tobytes() == expected[0]
    assert present and all(transformer > 0 and encoder == 0 for transformer, encoder in present)
    assert results(pipe) == expected
    assert weights(pipe._text_embedder) == 0
    pipe.drop_text_encoder(False)
    assert weights(pipe._text_embedder) > 0
    assert results(pipe) == expected


def test_prompts_that_were_encoded_need_no_encoder(published_folder: Path) -> None:
    pipe = load(published_folder, drop_text_encoder=True)
    first = pipe.generate(["a red dog", "a blue cat"], **QUIET).images
    pipe._loaders.clear()
    again = pipe.generate(["a red dog", "a blue cat"], **QUIET).images
    assert [one.tobytes() for one in first] == [one.tobytes() for one in again]
    with pytest.raises(InputError, match="wasn't loaded from a folder"):
        pipe.generate("the apple", **QUIET)


def test_dropping_is_refused_where_it_can_t_be_undone(
    published_folder: Path, tiny_pipeline: UniAlignmentPipeline
) -> None:
    with pytest.raises(InputError, match="small table"):
        tiny_pipeline.drop_text_encoder()
    pipe = load(published_folder)
    bare = UniAlignmentPipeline(pipe.transformer, pipe.text_embedder, pipe.autoencoder, pipe.tokenizer)
    with pytest.raises(InputError, match="wasn't loaded from one"):
        bare.drop_text_encoder()
    assert weights(bare.text_embedder) > 0


def test_alternating_frees_the_transformer_and_keeps_its_lora(published_folder: Path, lora_file: Path) -> None:
    plain = load(published_folder)
    plain.load_lora(lora_file, 0.5)
    expected = [plain.generate(prompt, **QUIET).images[0].tobytes() for prompt in ("a red dog", "a blue cat")]
    pipe = load(published_folder)
    pipe.load_lora(lora_file, 0.5)
    pipe.drop_text_encoder(alternate=True)
    embed, seen = T5TextEmbedder.embed, []

    def watched(self: T5TextEmbedder, *args: Any) -> torch.Tensor:
        seen.append(weights(pipe._transformer))
        return embed(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(T5TextEmbedder, "embed", watched)
        found = [pipe.generate(prompt, **QUIET).images[0].tobytes() for prompt in ("a red dog", "a blue cat")]
    assert found == expected
    assert seen and not any(seen)
    with pytest.raises(InputError, match="at once"):
        pipe.caption(PICTURE, **QUIET)


# ---------------------------------------------------------------------------------------------------------- offloading


@pytest.mark.parametrize("kind", ["model", "sequential", "group", "group on disk", "group of leaves on disk"])
def test_offloaded_results_are_the_same(kind: str, published_folder: Path, expected: list[Any], tmp_path: Path) -> None:
    pipe = load(published_folder)
    if kind == "model":
        pipe.enable_model_cpu_offload("cpu")
    elif kind == "sequential":
        pipe.enable_sequential_cpu_offload("cpu")
        # Weights wait outside of the modules, so any that were read without a hook would have no values.
        assert weights(pipe.transformer.transformer_blocks) == 0
        assert weights(pipe.text_embedder.encoder) == 0
    elif kind == "group":
        pipe.enable_group_offload("cpu")
    else:
        level = "leaf_level" if "leaves" in kind else "block_level"
        pipe.enable_group_offload(
            "cpu", offload_type=level, offload_to_disk_path=tmp_path / "waiting", num_blocks_per_group=2
        )
        results(pipe)
        assert len(list((tmp_path / "waiting").rglob("*.safetensors"))) > 3
        # All of it waits on disk now: what lies in memory between the passes must not count.
        with torch.no_grad():
            for module in (pipe.transformer, pipe.text_embedder, pipe.autoencoder):
                for tensor in tensors_of(module):
                    tensor.data.fill_(torch.nan)
    assert same(results(pipe), expected)
    assert not any(block.attn._fused for block in pipe.transformer.transformer_blocks), "a second hold on weights"
    pipe.disable_offload()
    assert {type(module).__name__ for module in (pipe.transformer, pipe.autoencoder)} == {
        "UniAlignmentTransformer",
        "KLAutoencoder",
    }
    for module in (pipe.transformer, pipe.text_embedder, pipe.autoencoder):
        own = [name for part in module.modules() for name in ("forward", "prefill", "encode") if name in vars(part)]
        assert not own
    assert same(results(pipe.to("cpu")), expected)


@pytest.mark.parametrize("kind", ["model", "group"])
def test_offloading_a_prefix_model(kind: str, make_tiny_pipeline: Callable[..., UniAlignmentPipeline]) -> None:
    pipe = make_tiny_pipeline()
    picture = Image.new("RGB", (16, 16), "red")
    before = pipe.edit("a red dog", picture, **QUIET).images[0].tobytes(), pipe.caption(picture, **QUIET).texts
    vectors = pipe.embed_text("a red dog")
    if kind == "model":
        pipe.enable_model_cpu_offload("cpu")
    else:
        pipe.enable_group_offload("cpu")
    assert (
        pipe.edit("a red dog", picture, **QUIET).images[0].tobytes(),
        pipe.caption(picture, **QUIET).texts,
    ) == before
    torch.testing.assert_close(pipe.embed_text("a red dog"), vectors)


def test_one_component_at_a_time(published_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a second device, by the order in which components come and go."""
    from accelerate.hooks import CpuOffload, UserCpuOffloadHook

    pipe = load(published_folder)
    names = {id(pipe.text_embedder): "text", id(pipe.transformer): "transformer", id(pipe.autoencoder): "vae"}
    events: list[str] = []
    enter, leave = CpuOffload.pre_forward, UserCpuOffloadHook.offload
    monkeypatch.setattr(
        CpuOffload,
        "pre_forward",
        lambda self, module, *a, **k: (events.append(f"+{names[id(module)]}"), enter(self, module, *a, **k))[1],
    )
    monkeypatch.setattr(
        UserCpuOffloadHook, "offload", lambda self: (events.append(f"-{names[id(self.model)]}"), leave(self))[1]
    )
    pipe.enable_model_cpu_offload("cpu")
    pipe.edit("a red dog", PICTURE, guidance_scale=3.0, **QUIET)
    used = [
        event[1:] for index, event in enumerate(events) if event[0] == "+" and event not in events[index - 1 : index]
    ]
    assert used == ["vae", "text", "transformer", "vae"]
    assert events[-3:] == ["-text", "-transformer", "-vae"]  # nothing stays at the end


def test_offloading_needs_an_accelerator(published_folder: Path) -> None:
    pipe = load(published_folder)
    if torch.accelerator.is_available():
        pytest.skip("there is one")
    for enable in (pipe.enable_model_cpu_offload, pipe.enable_sequential_cpu_offload, pipe.enable_group_offload):
        with pytest.raises(InputError, match="no accelerator here"):
            enable()
    with pytest.raises(InputError, match="can't be used here"):
        pipe.enable_model_cpu_offload("cuda:7")
    for options, message in (
        ({"offload_type": "by_name"}, "block_level or leaf_level"),
        ({"num_blocks_per_group": 0}, "at least 1"),
        ({"use_stream": True}, "CUDA"),
        ({"exclude_modules": ["unet"]}, "no component unet"),
    ):
        with pytest.raises(InputError, match=message):
            pipe.enable_group_offload("cpu", **options)


def test_what_excludes_offloading(published_folder: Path, lora_file: Path, tmp_path: Path) -> None:
    pipe = load(published_folder)
    pipe.enable_group_offload("cpu")
    with pytest.raises(InputError, match="disable_offload"):
        pipe.to("cpu")
    with pytest.raises(InputError, match="disable_offload"):
        pipe.save_pretrained(tmp_path / "m")
    with pytest.raises(InputError, match="disable_offload"):
        pipe.drop_text_encoder()
    # Layers that a LoRA changes are found by the hooks again.
    plain = load(published_folder)
    for each in (plain, pipe):
        each.load_lora(lora_file)
    pictures = [each.generate("a red dog", **QUIET).images[0].tobytes() for each in (plain, pipe)]
    assert pictures[0] == pictures[1]
    dropping = load(published_folder, drop_text_encoder=True)
    with pytest.raises(InputError, match="exclude each other"):
        dropping.enable_model_cpu_offload("cpu")


def test_tiles_and_slices(published_folder: Path, tiny_pipeline: UniAlignmentPipeline) -> None:
    pipe = load(published_folder)
    pictures = pipe.generate(["a red dog"] * 2, **QUIET).images
    pipe.enable_vae_slicing()
    sliced = pipe.generate(["a red dog"] * 2, **QUIET).images
    assert same([one.tobytes() for one in sliced], [one.tobytes() for one in pictures])
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    working = []
    for tile in (None, 32):
        if tile:
            pipe.enable_vae_tiling(tile)
        with torch.no_grad(), MemoryTracker(tensors_of(pipe.autoencoder)) as tracker:
            assert pipe.autoencoder.decode(latents).shape == (1, 3, 64, 64)
        working.append(tracker.peak)
    assert working[1] < working[0]
    with pytest.raises(InputError, match="multiple of 32"):
        pipe.enable_vae_tiling(50)
    pipe.disable_vae_tiling()
    pipe.disable_vae_slicing()
    assert not pipe.autoencoder.autoencoder.use_tiling and not pipe.autoencoder.autoencoder.use_slicing
    with pytest.raises(InputError, match="AutoencoderKL"):
        tiny_pipeline.enable_vae_tiling()


# -------------------------------------------------------------------------------------------------------- quantization


@pytest.mark.parametrize(
    "layout, bits",
    [
        ("published", "8bit"),
        ("unialignment", "4bit"),
        pytest.param("published", "4bit", marks=pytest.mark.slow),
        pytest.param("unialignment", "8bit", marks=pytest.mark.slow),
    ],
)
def test_quantized_weights(bits: str, layout: str, published_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("optimum.quanto")
    folder = published_folder
    if layout == "unialignment":
        folder = tmp_path / "ours"
        load(published_folder).save_pretrained(folder)
    plain, small = load(folder), load(folder, quantize=bits)
    assert is_quantized(small.transformer) and is_quantized(small.text_embedder)
    layer = small.transformer.transformer_blocks[0].ff.net[2]
    assert type(layer).__name__ == "QLinear" and layer.weight.qtype.name == f"qint{bits[0]}"
    assert type(small.transformer.text_proj_out) is torch.nn.Linear
    ids = torch.tensor([[5, 6, 7, 1]])
    error = (small.text_embedder.embed(ids) - plain.text_embedder.embed(ids)).norm() / plain.text_embedder.embed(
        ids
    ).norm()
    assert 0 < error < {"8bit": 0.05, "4bit": 0.6}[bits]
    assert results(small)[0] != results(plain)[0]
    for refused in (
        lambda: small.load_lora("x"),
        lambda: small.to(dtype="bfloat16"),
        lambda: small.save_pretrained("x"),
    ):
        with pytest.raises(InputError, match="plain weights"):
            refused()


def test_quantizing_one_component_and_dropping_it(published_folder: Path) -> None:
    pytest.importorskip("optimum.quanto")
    pipe = load(published_folder, quantize={"text_embedder": "8bit"}, drop_text_encoder=True)
    first = pipe.generate("a red dog", **QUIET).images[0].tobytes()
    assert not is_quantized(pipe.transformer) and weights(pipe._text_embedder) == 0
    pipe._remembered.clear()
    assert pipe.generate("a red dog", **QUIET).images[0].tobytes() == first


def test_a_missing_backend_is_said(published_folder: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="expected 8bit or 4bit"):
        load(published_folder, quantize="2bit")
    with pytest.raises(InputError, match="transformer or text_embedder"):
        load(published_folder, quantize="vae=8bit")
    assert parse_quantize("text_embedder=8bit, transformer=4bit") == {"text_embedder": "8bit", "transformer": "4bit"}
    with pytest.raises(InputError, match="too small to gain"):
        load(tiny_folder, quantize={"text_embedder": "8bit"})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="optimum-quanto, which isn't installed"):
        load(published_folder, quantize="8bit")
    with pytest.raises(InputError, match="bitsandbytes or optimum-quanto"):
        backend(torch.device("cuda"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    assert backend(torch.device("cuda")) == "bitsandbytes"
    assert backend(torch.device("cpu")) == "quanto"


# ---------------------------------------------------------------------------------------------------------------- LoRA


def test_a_lora_at_inference(published_folder: Path, lora_file: Path, tmp_path: Path, expected: list[Any]) -> None:
    pipe = load(published_folder)
    report = pipe.load_lora(lora_file, scale=0.7)
    assert len(report.matched) == 24 and not report.unmatched
    weaker = results(pipe)
    assert weaker[:2] != expected[:2]
    pipe.set_lora_scale(0.0)
    assert results(pipe) == expected
    pipe.set_lora_scale(0.7)
    assert results(pipe) == weaker
    with pytest.raises(InputError, match="loaded already"):
        pipe.load_lora(lora_file)
    with pytest.raises(InputError, match="unload_lora"):
        pipe.save_pretrained(tmp_path / "m")
    pipe.load_lora(lora_file, -0.7, name="back")  # two at once cancel out
    assert torch.allclose(_velocity(pipe), _velocity(load(published_folder)), atol=1e-4)
    pipe.unload_lora("back")
    assert results(pipe) == weaker
    pipe.unload_lora()
    assert results(pipe) == expected and not pipe.loras
    with pytest.raises(InputError, match="no LoRA 'default'"):
        pipe.set_lora_scale(1.0)
    with pytest.raises(InputError, match="must be a number"):
        pipe.load_lora(lora_file, float("nan"))
    with pytest.raises(InputError, match="must be a number"):
        pipe.set_lora_scale("strong")
    with pytest.raises(CheckpointError, match="no LoRA at"):
        pipe.load_lora(tmp_path / "absent.safetensors")
    assert results(pipe) == expected


@torch.no_grad()
def _velocity(pipe: UniAlignmentPipeline) -> torch.Tensor:
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    condition = pipe.condition(["a red dog"])
    return pipe.transformer(text_embeds=condition.text, latents=latents, timestep=torch.tensor([500.0])).velocity
