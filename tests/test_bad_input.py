"""The list of bad input that has to end in one clear line and leave nothing half-written, one test for each item.

More detailed tests of each are beside the module concerned; these go through what a user calls.
"""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import unialignment
from unialignment.errors import CheckpointError, ConfigError, InputError, StorageError, UniAlignmentError
from unialignment.model.folders import CHECKSUMS_NAME

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def complains(error: type[UniAlignmentError], words: str):
    """The block raises ``error`` with a message of one line that holds ``words``."""
    return pytest.raises(error, match=rf"(?s)\A(?=[^\n]*\Z)(?=.*(?:{words}))")


@pytest.fixture
def image() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))


@pytest.mark.parametrize("prompt", ["", "   \n\t ", "\x00\x01"])
def test_empty_prompts(tiny_pipeline, image: Image.Image, prompt: str):
    for draw in (
        lambda: tiny_pipeline.generate(prompt),
        lambda: tiny_pipeline.generate(["the dog", prompt]),
        lambda: tiny_pipeline.edit(prompt, image),
        lambda: tiny_pipeline.compose(prompt, [image]),
        lambda: tiny_pipeline.answer(image, prompt),
        lambda: tiny_pipeline.infill(image, prompt),
        lambda: tiny_pipeline.embed_text(prompt),
    ):
        with complains(InputError, "empty|nothing that the model can read|no gap"):
            draw()


def test_prompts_of_ten_thousand_words(tiny_pipeline, image: Image.Image):
    prompt = "the dog " * 5000
    for draw in (
        lambda: tiny_pipeline.generate(prompt),
        lambda: tiny_pipeline.generate("the dog", negative_prompt=prompt),
        lambda: tiny_pipeline.edit(prompt, image),
        lambda: tiny_pipeline.answer(image, prompt),
        lambda: tiny_pipeline.infill(image, prompt + "___"),
        lambda: tiny_pipeline.embed_text(prompt),
    ):
        with complains(InputError, "shorten it|shorten 'the dog") as caught:
            draw()
        assert len(str(caught.value)) < 300
    with complains(InputError, "characters"):
        tiny_pipeline.generate("x" * 10_000_000)


@pytest.mark.parametrize("prompt", [7, b"the dog", ["the dog", 7], [], "half a character \ud83d"])
def test_prompts_that_are_no_text(tiny_pipeline, prompt):
    with complains(InputError, "prompt"):
        tiny_pipeline.generate(prompt)


def test_pictures_that_are_none(tiny_pipeline, tmp_path: Path):
    text = tmp_path / "text.png"
    text.write_text("not a picture")
    for given, words in (
        (text, "not a picture"),
        (tmp_path / "absent.png", "no picture at"),
        (b"", "empty"),
        (tmp_path, "folder"),
        ("https://example.org/dog.png", "URLs are refused"),
        (np.zeros((4, 4, 7), np.uint8), "shape"),
        (object(), "object"),
    ):
        for call in (tiny_pipeline.caption, tiny_pipeline.perceive, tiny_pipeline.embed_image):
            with complains(InputError, words):
                call(given)


def test_truncated_pictures(tiny_pipeline, tmp_path: Path, image: Image.Image):
    for ending in ("png", "jpg", "webp", "gif"):
        path = tmp_path / f"whole.{ending}"
        image.save(path)
        cut = tmp_path / f"cut.{ending}"
        cut.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
        with complains(InputError, f"cut.{ending}"):
            tiny_pipeline.caption(cut)


def test_decompression_bombs_are_refused_from_their_header(tiny_pipeline, tmp_path: Path):
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0))
    rows = zlib.compress(b"\0" * (30_000 * 3 + 1) * 200, 9)
    path = tmp_path / "bomb.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", rows) + chunk(b"IEND", b""))
    started = time.perf_counter()
    with complains(InputError, "limit of 100,000,000"):
        tiny_pipeline.caption(path)
    assert time.perf_counter() - started < 1.0


def test_a_source_missing_for_edit(tiny_pipeline, image: Image.Image):
    with pytest.raises(TypeError, match="image"):
        tiny_pipeline.edit("replace the dog")
    for source in (None, []):
        with complains(InputError, "edit.*picture"):
            tiny_pipeline.edit("replace the dog", source)
    with complains(InputError, "edit takes 1 picture, 2 given"):
        tiny_pipeline.edit("replace the dog", [[image, image]])
    with complains(InputError, "don't pair up"):
        tiny_pipeline.edit(["red", "blue"], [image] * 3)


def test_wrong_numbers_of_pictures(tiny_pipeline, image: Image.Image):
    with complains(InputError, "compose takes 1 to 4 pictures, 5 given"):
        tiny_pipeline.compose("the dog next to the cat", [image] * 5)
    with complains(InputError, "generate takes no picture, 1 given"):
        tiny_pipeline.run("generate", "the dog", image)
    with complains(InputError, "caption takes 1 picture, 0 given"):
        tiny_pipeline.run("caption")
    with complains(InputError, "mixture"):
        tiny_pipeline.compose(["a dog", "a cat"], [image, [image]])


def test_unknown_names(tiny_pipeline, image: Image.Image):
    with complains(InputError, "Did you mean 'perceive'"):
        tiny_pipeline.run("percieve", None, image)
    with complains(InputError, "no kind 'depht'"):
        tiny_pipeline.perceive(image, "depht")
    with complains(InputError, "did you mean 'guidance_scale'"):
        tiny_pipeline.generate("the dog", guidence_scale=2.0)
    with complains(InputError, "solver"):
        tiny_pipeline.generate("the dog", solver="magic")
    with complains(InputError, "decoding"):
        tiny_pipeline.caption(image, decoding="magic")
    with complains(InputError, "takes no prompt"):
        tiny_pipeline.perceive(image, "depth", of="the dog")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"num_inference_steps": 2.5}, "num_inference_steps"),
        ({"num_inference_steps": True}, "num_inference_steps"),
        ({"guidance_scale": float("nan")}, "guidance_scale"),
        ({"guidance_scale": "high"}, "guidance_scale"),
        ({"guidance_scale": -1.0}, "negative"),
        ({"guidance_interval": (0.9, 0.1)}, "interval"),
        ({"guidance_interval": 3}, "interval"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt"),
        ({"num_images_per_prompt": 4, "best_of": 2}, "best_of"),
        ({"batch_size": -1}, "batch_size"),
        ({"seed": -1}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"seed": [1, 2, 3]}, "3 seeds"),
        ({"width": 33}, "multiple of 8"),
        ({"height": 4096}, "up to 64"),
        ({"shift": 0.0}, "shift"),
        ({"fit": "stretch"}, "crop"),
    ],
)
def test_unusable_options(tiny_pipeline, image: Image.Image, options: dict, words: str):
    with complains(InputError, words):
        tiny_pipeline.edit("red", image, **options)


def test_texts_that_do_not_fit(tiny_pipeline, image: Image.Image):
    with complains(InputError, "max_length"):
        tiny_pipeline.caption(image, max_length=1000)
    with complains(InputError, "at most 2 fit"):
        tiny_pipeline.infill(image, "the dog and the ___", max_length=2)
    with complains(InputError, "top_p"):
        tiny_pipeline.caption(image, temperature=1.0, top_p=0.0)


@pytest.fixture
def copy(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that may be damaged; without checksums, so that later checks have to notice."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    (folder / CHECKSUMS_NAME).unlink()
    return folder


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda state: state.pop("pos_embed.proj.weight"), r"1 missing \(pos_embed.proj.weight\)"),
        (lambda state: state.update(surplus=torch.zeros(2)), r"1 unexpected \(surplus\)"),
        (lambda state: state.update({"text_proj_out.bias": torch.zeros(3)}), "1 of another shape"),
    ],
    ids=["missing", "extra", "shape"],
)
def test_checkpoints_with_wrong_tensors(copy: Path, damage, words: str):
    state = load_file(copy / WEIGHTS)
    damage(state)
    save_file(state, copy / WEIGHTS)
    with complains(CheckpointError, words):
        unialignment.load(copy)


@pytest.mark.parametrize("name", ["transformer", "text_embedder", "autoencoder", "tokenizer"])
def test_incomplete_models(copy: Path, name: str):
    shutil.rmtree(copy / name)
    with complains(CheckpointError, name):
        unialignment.load(copy)


def test_models_with_damaged_parts(copy: Path, tiny_folder: Path, tmp_path: Path):
    weights = (copy / WEIGHTS).read_bytes()
    (copy / WEIGHTS).write_bytes(weights[: len(weights) // 2])
    with complains(CheckpointError, "truncated"):
        unialignment.load(copy)
    (copy / WEIGHTS).write_bytes(weights)
    config = json.loads((copy / "transformer/config.json").read_text())
    for change, words in (({"num_layers": 3}, "missing"), ({"num_layrs": 2}, "num_layrs"), ({"num_layers": "two"}, "")):
        (copy / "transformer/config.json").write_text(json.dumps({**config, **change}))
        with complains(CheckpointError, words):
            unialignment.load(copy)
    for text in ("", "[]", "{"):
        (copy / "model_index.json").write_text(text)
        with complains(CheckpointError, "model_index.json"):
            unialignment.load(copy)
    changed = tmp_path / "changed"
    shutil.copytree(tiny_folder, changed)
    data = bytearray((changed / WEIGHTS).read_bytes())
    data[-5] ^= 1
    (changed / WEIGHTS).write_bytes(data)
    with complains(CheckpointError, "damaged"):
        unialignment.load(changed)


def test_a_model_cannot_name_foreign_classes(copy: Path):
    index = json.loads((copy / "model_index.json").read_text())
    index["tokenizer"] = ["os", "system"]
    (copy / "model_index.json").write_text(json.dumps(index))
    with complains(CheckpointError, "tokenizer"):
        unialignment.load(copy)


class Attack:
    def __reduce__(self):
        return (os.system, ("echo attacked > attacked.txt",))


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "diffusion_pytorch_model.safetensors"])
def test_pickle_files(copy: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (copy / WEIGHTS).unlink()
    (copy / "transformer" / name).write_bytes(pickle.dumps(Attack()))
    with complains(CheckpointError, "pickle"):
        unialignment.load(copy)
    assert not (tmp_path / "attacked.txt").exists()


@pytest.fixture
def small_disk():
    """Files may grow to 8 KiB only, so that writing really fails as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_while_saving(tiny_pipeline, tiny_folder: Path, tmp_path: Path, small_disk: None):
    folder = tmp_path / "model"
    with complains(StorageError, "full|could not write"):
        tiny_pipeline.save_pretrained(folder)
    assert list(tmp_path.iterdir()) == []
    result = tiny_pipeline.generate("the dog", num_inference_steps=1)
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    result.images[0] = Image.fromarray(noise)
    with complains(StorageError, "full"):
        result.save(tmp_path / "picture.png")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_keeps_the_model_that_was_there(tiny_pipeline, tiny_folder: Path, tmp_path: Path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        with pytest.raises(StorageError):
            tiny_pipeline.save_pretrained(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert unialignment.load(folder).name == "tiny"


def test_a_folder_of_something_else_is_not_replaced(tiny_pipeline, tmp_path: Path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with complains(StorageError, "isn't a model"):
        tiny_pipeline.save_pretrained(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optimizer.lrr=1e-3", "did you mean 'optimizer.lr'"),
        ("optimiser.lr=1e-3", "optimizer"),
        ("optimizer.lr=fast", "optimizer.lr"),
        ("optimizer.lr=-1", "optimizer.lr"),
        ("optimizer.lr", "key=value"),
    ],
)
def test_config_typos(repo_root: Path, override: str, words: str):
    from unialignment.training.config import load_config

    with complains(ConfigError, words):
        load_config(repo_root / "configs" / "tiny.yaml", [override])


def test_config_files_that_are_none(tmp_path: Path, repo_root: Path):
    from unialignment.training.config import load_config

    with complains(ConfigError, "tiny.yaml"):
        load_config(repo_root / "configs" / "tinny.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("run: [1,\n")
    with complains(ConfigError, "not valid YAML"):
        load_config(broken)


def test_a_full_disk_while_training_keeps_the_last_checkpoint(tmp_path: Path):
    from unialignment.training.checkpoint import CheckpointStore

    store = CheckpointStore(tmp_path)
    store.save(1, {"weight": torch.arange(4.0)}, {})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        with complains(StorageError, "step 2"):
            store.save(2, {"weight": torch.zeros(100_000)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    tensors, state = store.load()
    assert state["step"] == 1
    assert torch.equal(tensors["weight"], torch.arange(4.0))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000001"]


@pytest.mark.slow
def test_ctrl_c_in_training_saves_and_stops(tmp_path: Path, repo_root: Path):
    from unialignment.errors import AssetError
    from unialignment.world.sprites import SpritePack

    try:
        SpritePack.load()
    except AssetError as error:
        pytest.skip(str(error))
    command = [sys.executable, "-m", "unialignment.cli", "train", str(repo_root / "configs" / "tiny.yaml")]
    command += [f"run.dir={tmp_path / 'run'}", "run.max_steps=100000", "data.workers=0", "logging.log_every=1"]
    environment = {**os.environ, "PYTHONPATH": str(repo_root / "src"), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    metrics = tmp_path / "run" / "metrics.jsonl"
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            if metrics.is_file() and metrics.stat().st_size:
                break
            time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert "Traceback" not in err
    assert "Stopped by SIGINT" in out + err
    from unialignment.training.checkpoint import CheckpointStore

    _, state = CheckpointStore(tmp_path / "run" / "checkpoints").load()
    assert state["step"] >= 1
    assert not [path for path in (tmp_path / "run").rglob("*") if "partial" in path.name]
