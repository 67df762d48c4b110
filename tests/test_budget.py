"""``max_memory``: what is chosen is obeyed and fits, and what can't fit is refused with what would be needed."""

from __future__ import annotations

import functools
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import T5Config, T5EncoderModel

import unialignment
from unialignment import budget
from unialignment.budget import MemoryChoice
from unialignment.cli import main
from unialignment.commands.loading import path_and_scale
from unialignment.errors import InputError
from unialignment.memory import measured_peak, size_of, tensors_of
from unialignment.model.autoencoder import PixelAutoencoder
from unialignment.model.lora import add_lora, save_lora
from unialignment.model.text import TokenEmbedder
from unialignment.model.transformer import UniAlignmentTransformer
from unialignment.pipeline import UniAlignmentPipeline
from unialignment.planning import InferenceMemory, folder_memory

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
QUIET: dict[str, Any] = {"progress": False, "num_inference_steps": 2, "seed": 1}
HUGE = 1 << 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pipeline in the published layout, with a T5 encoder that outweighs the rest."""
    path = Path(__file__).parent / "published" / "conftest.py"
    spec = importlib.util.spec_from_file_location("published_conftest", path)
    assert spec is not None and spec.loader is not None
    builders = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(builders)
    made: Path = builders.make_published_folder(tmp_path_factory.mktemp("models") / "tiny")
    for file in (made / "text_encoder").iterdir():
        file.unlink()
    torch.manual_seed(0)
    T5EncoderModel(
        T5Config(
            vocab_size=160, d_model=48, d_kv=8, d_ff=4096, num_layers=5, num_heads=4, feed_forward_proj="gated-gelu"
        )
    ).save_pretrained(made / "text_encoder")
    return made


@functools.cache
def _predicted(folder: Path, dtype: torch.dtype, quantize: tuple[Any, ...], tiling: bool) -> InferenceMemory:
    return folder_memory(folder, dtype, quantize=dict(quantize), tiling=tiling)


def predict(folder: Path, dtype: torch.dtype, *, quantize: Any = None, tiling: bool = False) -> InferenceMemory:
    """The same prediction isn't made twice: it takes seconds."""
    return _predicted(folder, dtype, tuple((quantize or {}).items()), tiling)


def choose(*args: Any, **options: Any) -> MemoryChoice:
    return budget.choose(*args, **options, predict=predict)


def test_the_order_of_switches(folder: Path) -> None:
    """Walking down the ladder: every step is taken just when the one before it no longer fits."""
    exact, half = (predict(folder, dtype) for dtype in (torch.float32, torch.bfloat16))
    tiled = predict(folder, torch.bfloat16, tiling=True)
    assert exact.peak > half.peak >= tiled.peak > tiled.without_text_encoder
    choice = choose(folder, exact.peak, CPU)
    assert (choice.dtype, choice.tiling, choice.drop_text_encoder) == (torch.float32, False, False)
    choice = choose(folder, exact.peak - 1, CPU)
    assert (choice.dtype, choice.drop_text_encoder) == (torch.bfloat16, False)
    choice = choose(folder, tiled.peak - 1, CPU)
    assert (choice.dtype, choice.tiling, choice.drop_text_encoder) == (torch.bfloat16, True, True)
    assert choice.predicted == tiled.without_text_encoder
    choice = choose(folder, tiled.peak - 1, CUDA)
    assert (choice.offload, choice.drop_text_encoder) == ("model", False)
    assert tiled.grouped < tiled.offloaded
    assert choose(folder, tiled.offloaded - 1, CUDA).offload == "group"
    assert choose(folder, HUGE, CPU).batch_size == 64
    assert choose(folder, exact.peak, CPU, dtype=torch.float32).dtype == torch.float32


def test_a_fixed_dtype_is_kept(folder: Path) -> None:
    exact = predict(folder, torch.float32)
    choice = choose(folder, exact.peak - 1, CPU, dtype=torch.float32)
    assert choice.dtype == torch.float32 and (choice.tiling or choice.drop_text_encoder)


def test_a_refusal_says_what_would_be_needed(folder: Path) -> None:
    with pytest.raises(InputError, match=r"can't get along with 1\.0 KiB on cpu") as refused:
        choose(folder, 1024, CPU)
    needed = re.search(r"needs ([\d.]+) MiB", str(refused.value))
    assert needed is not None
    assert choose(folder, int((float(needed[1]) + 0.1) * 2**20), CPU).drop_text_encoder
    for nonsense in ("plenty", 0, float("nan")):
        with pytest.raises(InputError, match="is not a size"):
            unialignment.load(folder, max_memory=nonsense)


def test_a_refusal_names_quantizing_where_it_would_help() -> None:
    def predict(*_: Any, quantize: Any = None, **__: Any) -> InferenceMemory:
        size = 3 * 2**30 if quantize else 9 * 2**30
        return InferenceMemory(
            {"transformer": size}, dict.fromkeys(("text", "denoise", "write"), 1), size, size, size, size
        )

    with pytest.raises(
        InputError, match=r"needs 9\.00 GiB; allow 9\.00 GiB, or use quantize='4bit' \(about 3\.00 GiB\)"
    ):
        budget.choose(Path("absent"), 2**30, CUDA, predict=predict)
    with pytest.raises(InputError, match=r"needs 3\.00 GiB; allow 3\.00 GiB$"):
        budget.choose(Path("absent"), 2**30, CUDA, quantize={"transformer": "4bit"}, predict=predict)


def test_what_is_chosen_is_done_and_fits(folder: Path) -> None:
    exact = predict(folder, torch.float32)
    tiled = predict(folder, torch.float32, tiling=True)
    pipe = unialignment.load(folder, device="cpu", dtype="float32", max_memory=tiled.peak - 1)
    assert pipe.memory_choice is not None and pipe.memory_choice.drop_text_encoder and pipe.batch_limit == 1
    assert pipe.autoencoder.autoencoder.use_slicing and pipe.autoencoder.autoencoder.use_tiling
    picture = Image.new("RGB", (64, 64), "red")
    peaks = []
    for prompt in ("a red dog", "a blue cat"):  # also with the transformer loaded already
        here = size_of(t for t in tensors_of(*_parts(pipe)) if t.device.type != "meta")
        used, _ = measured_peak(lambda prompt=prompt: pipe.edit(prompt, picture, guidance_scale=3.0, **QUIET))
        peaks.append(here + used)
    assert max(peaks) < exact.peak
    with pytest.raises(InputError, match="at once"):
        pipe.answer(picture, "what is red", **QUIET)


def _parts(pipe: UniAlignmentPipeline) -> tuple[Any, ...]:
    return pipe._transformer, pipe._text_embedder, pipe.autoencoder


def test_the_number_of_samples_at_once(tiny_folder: Path) -> None:
    memory = predict(tiny_folder, torch.float32)
    pipe = unialignment.load(tiny_folder, device="cpu", max_memory=memory.peak + 1)
    seen: list[int] = []
    pipe.generate(
        "a red dog",
        num_images_per_prompt=3,
        callback_on_step_end=lambda *given: seen.append(len(given[3]["indices"])),
        **QUIET,
    )
    assert pipe.batch_limit == 1 and set(seen) == {1}
    assert unialignment.load(tiny_folder, device="cpu", max_memory="4GiB").batch_limit == 64


@pytest.mark.parametrize("stage", ["peak", "without_text_encoder"])
def test_predictions_of_a_folder_against_the_allocator(stage: str, folder: Path) -> None:
    predicted = predict(folder, torch.float32)
    pipe = unialignment.load(folder, device="cpu", drop_text_encoder=stage != "peak")
    picture = Image.new("RGB", (64, 64), "red")
    size = size_of(tensors_of(pipe.autoencoder)) + (0 if stage != "peak" else predicted.weights["transformer"])
    here = size + predicted.weights["text_embedder"]
    used, _ = measured_peak(lambda: pipe.edit("a red dog", picture, guidance_scale=3.0, **QUIET))
    assert getattr(predicted, stage) == pytest.approx(here + used, rel=0.15)


def test_caches_without_room_for_targets(tmp_path: Path, tiny_pipeline: UniAlignmentPipeline) -> None:
    """In a model that caches conditions, `max_memory` gives up a little time for much of the cache."""
    torch.manual_seed(0)
    tokenizer = tiny_pipeline.tokenizer
    transformer = UniAlignmentTransformer(
        **{"sample_size": 64, "patch_size": 4, "in_channels": 3, "num_layers": 6, "attention_head_dim": 32},
        **{"num_attention_heads": 4, "joint_attention_dim": 24, "pos_embed_max_size": 16, "attention_mode": "prefix"},
        vocab_size=tokenizer.vocab_size,
    )
    embedder = TokenEmbedder(tokenizer.vocab_size, 24, max_length=48)
    UniAlignmentPipeline(transformer, embedder, PixelAutoencoder(), tokenizer).save_pretrained(tmp_path / "model")
    predicted = folder_memory(tmp_path / "model", torch.float32, prompt_tokens=4)
    picture, pictures, peaks = Image.new("RGB", (64, 64), "red"), [], []
    pipes = [
        unialignment.load(tmp_path / "model", device="cpu", dtype="float32", max_memory=limit)
        for limit in (None, "1GiB")
    ]
    for pipe in pipes:

        def edit(pipe: UniAlignmentPipeline = pipe) -> Any:
            return pipe.edit("a red dog", picture, guidance_scale=3.0, **QUIET)

        pictures.append(np.asarray(edit().images[0]).astype(int))
        weights = size_of(tensors_of(*_parts(pipe)))
        peaks.append(weights + measured_peak(edit)[0])
    assert np.abs(pictures[0] - pictures[1]).max() <= 2
    assert peaks[1] < peaks[0] - 0.5e6
    assert predicted.peak == pytest.approx(peaks[1], rel=0.15)


# ------------------------------------------------------------------------------------------------------------ commands


def test_commands_say_what_was_chosen(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", "a red dog", "--model", str(tiny_folder), "--device", "cpu", "--steps", "1", "--seed", "1"]
    command += ["-o", str(tmp_path / "a.png")]
    assert main([*command, "--max-memory", "1GiB"]) == 0
    assert "max-memory: float32, 64 at once" in capsys.readouterr().err
    assert main([*command, "--max-memory", "1GiB", "--json"]) == 0
    assert "predicted of 1.00 GiB" in json.loads(capsys.readouterr().out)["notes"][0]
    assert main([*command, "--max-memory", "10KiB"]) == 2
    assert "it needs" in capsys.readouterr().err
    for wrong, message in (
        (["--max-memory", "1GiB", "--offload", "model"], "leave out --offload"),
        (["--quantize", "3bit"], "expected 8bit or 4bit"),
        (["--drop-text-encoder"], "none to drop"),
        (["--vae-tiling"], "AutoencoderKL"),
        (["--offload", "model"], "name the accelerator"),
        (["--lora", "x.safetensors", "--quantize", "8bit"], "unialign merge"),
        (["--lora", "absent.safetensors"], "no LoRA at"),
        (["--lora", ":0.5"], "PATH:SCALE"),
    ):
        assert main([*command, *wrong]) == 2
        assert message in capsys.readouterr().err
    if not torch.accelerator.is_available():
        assert main([*command[:4], *command[6:], "--offload", "group"]) == 2
        assert "no accelerator" in capsys.readouterr().err


def test_commands_with_a_lora(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import load_file, save_file

    model = unialignment.load(tiny_folder, device="cpu").transformer
    add_lora(model, rank=2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.5)
    file = save_lora(model, tmp_path / "a.safetensors")
    state = {
        **load_file(file),
        "text_encoder.q.lora_A.weight": torch.zeros(2, 2),
        "text_encoder.q.lora_B.weight": torch.zeros(2, 2),
    }
    save_file(state, tmp_path / "b.safetensors")
    command = ["generate", "a red dog", "--model", str(tiny_folder), "--device", "cpu", "--steps", "1", "--seed", "1"]
    pictures = {}
    for scale in ("", ":0", ":0.5"):
        path = tmp_path / f"out{scale[1:]}.png"
        assert main([*command, "-o", str(path), "--lora", f"{tmp_path / 'b.safetensors'}{scale}"]) == 0
        said = capsys.readouterr().err
        assert "16 layers matched" in said and "unmatched text_encoder.q: belongs to a text encoder" in said
        pictures[scale] = Image.open(path).tobytes()
    assert main([*command, "-o", str(tmp_path / "plain.png")]) == 0
    assert pictures[":0"] == Image.open(tmp_path / "plain.png").tobytes()
    assert len(set(pictures.values())) == 3


def test_lora_arguments() -> None:
    assert path_and_scale("a.safetensors") == ("a.safetensors", 1.0)
    assert path_and_scale("a.safetensors:0.8") == ("a.safetensors", 0.8)
    assert path_and_scale("C:\\loras\\a.safetensors") == ("C:\\loras\\a.safetensors", 1.0)
    assert path_and_scale("C:\\loras\\a.safetensors:-1") == ("C:\\loras\\a.safetensors", -1.0)
