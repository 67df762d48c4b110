"""Stable Diffusion 3 and 3.5 as a start: the image path is theirs, and every new and dropped tensor is named."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel
from PIL import Image
from safetensors.torch import load_file, save_file

import unialignment
from unialignment.cli import main
from unialignment.errors import CheckpointError, InputError
from unialignment.memory import size_of, tensors_of
from unialignment.model.convert import convert
from unialignment.model.initialise import _needed_names, initialise_from_sd3
from unialignment.model.streaming import read_entries
from unialignment.model.transformer import UniAlignmentTransformer
from unialignment.planning import folder_memory

FLAVOURS: dict[str, dict[str, object]] = {
    "3.0": {},
    "3.0 with QK-norm": {"qk_norm": "rms_norm"},
    "3.5": {"qk_norm": "rms_norm", "dual_attention_layers": (0, 1)},
    "3.5 to the last block": {"qk_norm": "rms_norm", "dual_attention_layers": (0, 2)},
}
SIZES = {
    **{"sample_size": 8, "patch_size": 2, "in_channels": 4, "num_layers": 3, "attention_head_dim": 16},
    **{"num_attention_heads": 4, "joint_attention_dim": 48, "caption_projection_dim": 64},
    **{"pooled_projection_dim": 32, "out_channels": 4, "pos_embed_max_size": 12},
}


def stable_diffusion(folder: Path, flavour: str, **changes: object) -> SD3Transformer2DModel:
    torch.manual_seed(0)
    model = SD3Transformer2DModel(**{**SIZES, **FLAVOURS[flavour], **changes}).eval()
    for name, parameter in model.named_parameters():
        norm = ".norm_" in name and "linear" not in name
        std = 0.1 if parameter.ndim > 1 else 0.2
        torch.nn.init.normal_(parameter, mean=1.0 if norm else 0.0, std=std)
    model.save_pretrained(folder)
    return model


def passes(theirs: SD3Transformer2DModel, ours: UniAlignmentTransformer, height: int, width: int, batch: int):
    generator = torch.Generator().manual_seed(batch)
    latents = torch.randn(batch, 4, height, width, generator=generator)
    text = torch.randn(batch, 9, 48, generator=generator)
    timestep = torch.rand(batch, generator=generator) * 1000
    with torch.no_grad():
        expected = theirs(latents, text, torch.zeros(batch, 32), timestep).sample
        return expected, ours(text_embeds=text, latents=latents, timestep=timestep).velocity


@pytest.mark.parametrize(("height", "width", "batch"), [(8, 8, 2), (12, 16, 1), (24, 6, 3)])
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_the_image_path_is_theirs(tmp_path: Path, flavour: str, height: int, width: int, batch: int) -> None:
    theirs = stable_diffusion(tmp_path, flavour)
    ours, _ = initialise_from_sd3(tmp_path, vocab_size=50)
    expected, found = passes(theirs, ours, height, width, batch)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert expected.std() > 0.1  # not trivially so


def test_other_sizes_too(tmp_path: Path) -> None:
    sizes = {"num_layers": 5, "attention_head_dim": 32, "num_attention_heads": 2, "pos_embed_max_size": 20}
    theirs = stable_diffusion(tmp_path, "3.5", **sizes, sample_size=16)
    ours, _ = initialise_from_sd3(tmp_path, vocab_size=7)
    expected, found = passes(theirs, ours, 16, 40, 2)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_every_tensor_is_accounted_for(tmp_path: Path, flavour: str) -> None:
    theirs = stable_diffusion(tmp_path, flavour).state_dict()
    ours, report = initialise_from_sd3(tmp_path, vocab_size=50)
    last = "transformer_blocks.2."
    assert set(report.new) == {
        *("null_image_embd", "text_proj_out.weight", "text_proj_out.bias"),
        *(f"{last}attn.to_add_out.{kind}" for kind in ("weight", "bias")),
        *(f"{last}ff_context.{layer}.{kind}" for layer in ("net.0.proj", "net.2") for kind in ("weight", "bias")),
    }
    assert set(report.extended) == {f"{last}norm1_context.linear.{kind}" for kind in ("weight", "bias")}
    assert set(report.dropped) == {name for name in theirs if "time_text_embed.text_embedder" in name}
    parts = [report.copied, report.extended, report.folded, report.new]
    names = [name for part in parts for name in part]
    assert sorted(names) == sorted(ours.state_dict()) and len(set(names)) == len(names)
    assert len(report.copied) + len(report.extended) + len(report.folded) + len(report.dropped) == len(theirs)
    assert all(name in report.summary() for name in (*report.new, *report.dropped, *report.folded))
    for name in report.copied:
        source = name.replace("image_norm_out", "norm_out").replace("image_proj_out", "proj_out")
        assert torch.equal(ours.state_dict()[name], theirs[source]), name


def test_new_parts_start_as_the_identity_learn_and_repeat(tmp_path: Path) -> None:
    stable_diffusion(tmp_path, "3.5")
    ours, _ = initialise_from_sd3(tmp_path, vocab_size=50, seed=3)
    again, _ = initialise_from_sd3(tmp_path, vocab_size=50, seed=3)
    other, _ = initialise_from_sd3(tmp_path, vocab_size=50, seed=4)
    states = [model.state_dict() for model in (ours, again, other)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert not torch.equal(states[0]["text_proj_out.weight"], states[2]["text_proj_out.weight"])
    text, latents = torch.randn(1, 5, 48), torch.randn(1, 4, 8, 8)
    output = ours(text_embeds=text, latents=latents, timestep=torch.zeros(1), target="text", feature_layer=2)
    expected = torch.nn.functional.layer_norm(output.mid_text_features, (64,), eps=1e-6)
    torch.testing.assert_close(output.text_features, expected)  # the last block passes text through
    output.text_logits.square().mean().backward()
    gates = ours.transformer_blocks[2].norm1_context.linear.weight.grad[2 * 64 :]
    assert gates.abs().sum() > 0


def test_it_can_start_a_prefix_model(tmp_path: Path) -> None:
    stable_diffusion(tmp_path, "3.5")
    ours, report = initialise_from_sd3(tmp_path, vocab_size=50, attention_mode="prefix", embedding_dim=8)
    assert {"reference_embed.weight", "condition_text_embed", "image_embedding_head.weight"} <= set(report.new)
    text, latents = torch.randn(2, 5, 48), torch.randn(2, 4, 8, 8)
    timestep = torch.tensor([100.0, 900.0])
    with torch.no_grad():
        whole = ours(text_embeds=text, latents=latents, sources=[latents.flip(0)], timestep=timestep).velocity
        cache = ours.prefill(text_embeds=text, images=[latents.flip(0)])
        cached = ours.denoise(cache, latents=latents, timestep=timestep).velocity
    torch.testing.assert_close(cached, whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize("mode", ["joint", "prefix"])
def test_dual_attention_is_saved_and_loaded(tmp_path: Path, mode: str) -> None:
    stable_diffusion(tmp_path / "theirs", "3.5")
    ours, _ = initialise_from_sd3(tmp_path / "theirs", vocab_size=50, attention_mode=mode)
    ours.save_pretrained(tmp_path / "ours")
    again = UniAlignmentTransformer.from_pretrained(tmp_path / "ours").eval()
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in ours.state_dict().items())
    assert again.transformer_blocks[0].attn2 is not None and again.transformer_blocks[2].attn2 is None


def test_half_precision_weights_give_the_same_start(tmp_path: Path) -> None:
    theirs = stable_diffusion(tmp_path / "whole", "3.0")
    theirs.half().save_pretrained(tmp_path / "half")
    ours, _ = initialise_from_sd3(tmp_path / "half", vocab_size=50)
    assert {value.dtype for value in ours.state_dict().values()} == {torch.float32}
    expected, found = passes(theirs.float(), ours, 8, 8, 2)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    small, _ = initialise_from_sd3(tmp_path / "half", vocab_size=50, dtype=torch.bfloat16)
    assert {value.dtype for value in small.state_dict().values()} == {torch.bfloat16}


# ------------------------------------------------------------------------------------------------------ whole pipelines


@pytest.fixture
def sd3_folder(tmp_path: Path, published_folder: Path) -> Path:
    """A Stable Diffusion 3.5 pipeline folder, less its CLIP encoders, which nothing reads."""
    folder = tmp_path / "sd35"
    folder.mkdir()
    names = {"vae": "vae", "scheduler": "scheduler", "text_encoder": "text_encoder_3", "tokenizer": "tokenizer_3"}
    for name, place in names.items():
        shutil.copytree(published_folder / name, folder / place)
    stable_diffusion(folder / "transformer", "3.5")
    index = {"_class_name": "StableDiffusion3Pipeline", "transformer": ["diffusers", "SD3Transformer2DModel"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def test_a_pipeline_folder_loads_as_a_start(sd3_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    pipe = unialignment.load(sd3_folder)
    assert pipe.initialisation is not None
    for name in ("text_proj_out.weight", "null_image_embd", "time_text_embed.text_embedder.linear_1.weight"):
        assert name in caplog.text
    assert pipe.tokenizer.vocab_size == pipe.transformer.config.vocab_size
    image = pipe.generate("a red dog", seed=0, num_inference_steps=2).images[0]
    text = pipe.caption(Image.new("RGB", (64, 64)), seed=0, num_inference_steps=2, max_length=6).texts[0]
    pipe.save_pretrained(sd3_folder.parent / "start")
    again = unialignment.load(sd3_folder.parent / "start")
    assert again.initialisation is None
    repeated = again.generate("a red dog", seed=0, num_inference_steps=2).images[0]
    assert np.array_equal(np.asarray(image), np.asarray(repeated))
    assert again.caption(Image.new("RGB", (64, 64)), seed=0, num_inference_steps=2, max_length=6).texts[0] == text


def test_training_starts_from_it(sd3_folder: Path, repo_root: Path, tmp_path: Path, pack: object) -> None:
    """Straight from their folder, full weights: what is new learns too, and the pooled projection is gone."""
    from rich.console import Console

    from unialignment.training.config import load_config
    from unialignment.training.loop import Trainer

    start = unialignment.load(sd3_folder, device="cpu").transformer.state_dict()
    overrides = [
        *(f"run.dir={tmp_path / 'run'}", "run.max_steps=2", "data.workers=0", f"model.initial={sd3_folder}"),
        *("text.max_length=256", "loss.cross=0", "loss.intrinsic=0", "logging.tensorboard=false"),
        *("logging.samples=false", "optimizer.warmup_steps=0", "ema.decay=0"),
        "mixture={generate: 1, edit: 1, caption: 2, answer: 0, perceive: 0, control: 0, compose: 0, infill: 0}",
    ]
    config = load_config(repo_root / "configs" / "tiny.yaml", overrides)
    trained = unialignment.load(Trainer(config, Console(quiet=True)).train(), device="cpu").transformer.state_dict()
    last = "transformer_blocks.2."
    for name in (
        "text_proj_out.weight",
        f"{last}norm1_context.linear.weight",
        "transformer_blocks.0.attn2.to_q.weight",
    ):
        assert not torch.equal(trained[name], start[name]), name
    assert set(trained) == set(start) and not any(".text_embedder." in name for name in trained)


def test_a_start_in_little_memory(sd3_folder: Path) -> None:
    expected = unialignment.load(sd3_folder, device="cpu")
    options = {"seed": 1, "num_inference_steps": 2, "progress": False}
    pipe = unialignment.load(sd3_folder, device="cpu")
    pipe.drop_text_encoder(alternate=True)
    for prompt in ("a red dog", "a blue cat"):
        wanted, found = (one.generate(prompt, **options).images[0].tobytes() for one in (expected, pipe))
        assert found == wanted
    late = unialignment.load(sd3_folder, device="cpu", drop_text_encoder=True)
    assert all(tensor.is_meta for tensor in tensors_of(late._transformer))
    assert late.initialisation == expected.initialisation
    assert late.generate("a blue cat", **options).images[0].tobytes() == wanted
    memory = folder_memory(sd3_folder, torch.float32)
    parts = {name: getattr(expected, name) for name in memory.weights}
    assert {name: size_of(tensors_of(part)) for name, part in parts.items()} == pytest.approx(memory.weights, rel=0.01)
    with pytest.raises(InputError, match="plain weights"):
        unialignment.load(sd3_folder, device="cpu", quantize="8bit")


@pytest.mark.parametrize("half", [False, True])
def test_converting_gives_what_loading_gives(
    sd3_folder: Path, tmp_path: Path, half: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without the model in memory: only what is new is made, the rest is copied as it lies there."""
    path = sd3_folder / "transformer" / "diffusion_pytorch_model.safetensors"
    if half:
        save_file({name: value.half() for name, value in load_file(path).items()}, path, {"format": "pt"})
    loaded = unialignment.load(sd3_folder, device="cpu")
    assert main(["convert", str(sd3_folder), "--out", str(tmp_path / "start"), "--max-shard-size", "30KB"]) == 0
    start = unialignment.load(tmp_path / "start", device="cpu")
    for name in ("transformer", "text_embedder", "autoencoder"):
        one, other = getattr(loaded, name).state_dict(), getattr(start, name).state_dict()
        assert set(one) == set(other) and all(torch.equal(value, other[key]) for key, value in one.items()), name
    assert (start.sampling, start.tokenizer.fingerprint) == (loaded.sampling, loaded.tokenizer.fingerprint)
    assert start.transformer.config.dual_attention_layers == [0, 1] and start.initialisation is None
    manifest = json.loads((tmp_path / "start" / "manifest.json").read_text())
    report = loaded.initialisation
    assert report is not None and (manifest["from"], manifest["to"]) == ("sd3", "unialignment")
    for what in ("new", "extended", "folded", "dropped"):
        assert manifest["initialisation"][what] == list(getattr(report, what))
    kept = {entry.dtype for entry in read_entries(tmp_path / "start" / "transformer").values()}
    assert kept == ({"F16", "F32"} if half else {"F32"})
    options = {"seed": 0, "num_inference_steps": 1, "progress": False}
    pictures = [pipe.generate("a red dog", **options).images[0].tobytes() for pipe in (loaded, start)]
    assert pictures[0] == pictures[1]
    # From there it can go on to the published layout, but not back to where it came from.
    published = convert(tmp_path / "start", tmp_path / "published")
    assert (
        unialignment.load(published, device="cpu").generate("a red dog", **options).images[0].tobytes() == pictures[0]
    )
    assert main(["convert", str(sd3_folder), "--out", str(tmp_path / "no"), "--to", "published"]) == 2
    assert "'unialignment' only" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda at: shutil.rmtree(at / "text_encoder_3"), "no text_encoder_3"),
        (lambda at: (at / "vae" / "diffusion_pytorch_model.safetensors").unlink(), "no weights"),
        (lambda at: os.truncate(at / "text_encoder_3" / "model.safetensors", 5000), "truncated"),
        (
            lambda at: change(at / "text_encoder_3" / "config.json", d_model=32),
            "32 wide and the transformer expects 48",
        ),
        (lambda at: change(at / "transformer" / "config.json", num_layers=4), "missing"),
    ],
)
def test_half_of_a_pipeline_is_neither_loaded_nor_converted(
    sd3_folder: Path, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(sd3_folder)
    before = sorted(tmp_path.iterdir())
    for use in (unialignment.load, lambda folder: convert(folder, tmp_path / "out")):
        with pytest.raises(CheckpointError, match=message):
            use(sd3_folder)
    assert sorted(tmp_path.iterdir()) == before


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    ("lost", "gained", "message"),
    [
        ("transformer_blocks.0.attn.to_q.weight", None, r"1 missing \(transformer_blocks.0.attn.to_q.weight"),
        ("transformer_blocks.2.norm1_context.linear.bias", None, "1 missing"),
        ("time_text_embed.text_embedder.linear_1.bias", None, "1 missing"),
        ("proj_out.weight", None, r"1 missing \(image_proj_out.weight"),
        (None, "transformer_blocks.2.ff_context.net.3.weight", "1 unexpected"),
    ],
)
def test_weights_of_something_else_are_refused(
    tmp_path: Path, lost: str | None, gained: str | None, message: str
) -> None:
    stable_diffusion(tmp_path, "3.0")
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    state = {name: value for name, value in load_file(path).items() if name != lost}
    save_file(state | ({gained: torch.ones(2)} if gained else {}), path)
    with pytest.raises(CheckpointError, match=message):
        initialise_from_sd3(tmp_path)


def test_another_config_is_refused(tmp_path: Path) -> None:
    stable_diffusion(tmp_path, "3.5")
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    for change, message in [
        ({"_class_name": "FluxTransformer2DModel"}, "describes a FluxTransformer2DModel; expected SD3Transformer2DM"),
        ({"num_layers": 4}, "missing"),
        ({"joint_attention_dim": 40}, "of another shape"),
        ({"dual_attention_layers": []}, "unexpected"),
        ({"dual_attention_layers": [7]}, "must be blocks 0 to 2"),
        ({"qk_norm": "layer_norm"}, "qk_norm='layer_norm' is unknown"),
    ]:
        path.write_text(json.dumps(config | change))
        with pytest.raises(CheckpointError, match=message):
            initialise_from_sd3(tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        {"sample_size": 128, "pos_embed_max_size": 192},
        {
            **{"sample_size": 128, "pos_embed_max_size": 384, "qk_norm": "rms_norm"},
            **{"dual_attention_layers": tuple(range(13))},
        },
    ],
    ids=["3 medium", "3.5 medium"],
)
def test_full_sizes_fit_tensor_by_tensor(config: dict[str, object]) -> None:
    """The published sizes, on the meta device: names and shapes without memory."""
    sizes = {
        **{"num_layers": 24, "attention_head_dim": 64, "num_attention_heads": 24, "joint_attention_dim": 4096},
        **{"in_channels": 16, "out_channels": 16, "caption_projection_dim": 1536},
        **config,
    }
    with torch.device("meta"):
        theirs = SD3Transformer2DModel(**sizes, pooled_projection_dim=2048)
        ours = UniAlignmentTransformer(**sizes, vocab_size=32100)
    shapes = {name: tuple(value.shape) for name, value in theirs.state_dict().items()}
    assert len(_needed_names(ours, "transformer_blocks.23.", shapes, Path("medium"))) == len(shapes) - 4
    assert 2.0e9 < sum(parameter.numel() for parameter in ours.parameters()) < 2.7e9
