"""Folders into folders: bit-exact there and back, whole or not at all, and a merged LoRA equals its adapter."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from unialignment.cli import main
from unialignment.errors import CheckpointError, InputError, StorageError
from unialignment.model.convert import MANIFEST_NAME, add_runs, convert, merge_folder
from unialignment.model.folders import CHECKSUMS_NAME
from unialignment.model.lora import add_lora, load_lora, save_lora
from unialignment.model.streaming import format_size, parse_size, read_entries
from unialignment.pipeline import UniAlignmentPipeline


def tensors(folder: Path) -> dict[str, bytes]:
    """Bytes, type and shape of every tensor of a model folder, by component and name."""
    found = {}
    for file in sorted(folder.rglob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                tensor = opened.get_tensor(name)
                data = tensor.flatten().view(torch.uint8).numpy().tobytes()
                found[f"{file.parent.name}/{name}"] = f"{tensor.dtype} {tensor.shape}".encode() + data
    return found


@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_there_and_back_is_bit_exact(published_folder: Path, tmp_path: Path, shard: str) -> None:
    ours = convert(published_folder, tmp_path / "ours", max_shard_size=shard)
    back = convert(ours, tmp_path / "back", max_shard_size=shard)
    assert tensors(back) == tensors(published_folder)
    before, after = (torch.load(f / "mask_token_emb_00001.pth", weights_only=True) for f in (published_folder, back))
    assert torch.equal(before, after) and before.shape == after.shape
    for name in ("transformer/config.json", "vae/config.json", "text_encoder/config.json", "model_index.json"):
        assert json.loads((back / name).read_text()) == json.loads((published_folder / name).read_text())
    for name in ("tokenizer", "scheduler"):
        files = {file.name: file.read_bytes() for file in (published_folder / name).iterdir()}
        assert {file.name: file.read_bytes() for file in (back / name).iterdir()} == files
    if shard == "20KB":
        assert len(list((ours / "transformer").glob("*.safetensors"))) > 5
        assert (ours / "text_embedder" / "model.safetensors.index.json").is_file()
    again = convert(back, tmp_path / "again")
    assert {k: v for k, v in tensors(again).items() if "mask" not in k} == {
        k: v for k, v in tensors(ours).items() if "mask" not in k
    }


def test_both_layouts_are_the_same_model(published_folder: Path, tmp_path: Path) -> None:
    ours = convert(published_folder, tmp_path / "ours")
    one, two = (UniAlignmentPipeline.from_pretrained(folder, device="cpu") for folder in (published_folder, ours))
    options: dict[str, Any] = {"seed": 3, "num_inference_steps": 2, "progress": False}
    pictures = [pipe.generate("a red dog", **options).images[0] for pipe in (one, two)]
    assert pictures[0].tobytes() == pictures[1].tobytes()
    texts = [pipe.caption(pictures[0], max_length=8, **options).texts for pipe in (one, two)]
    assert texts[0] == texts[1]
    assert one.sampling == two.sampling
    assert one.embed_text("the cat").equal(two.embed_text("the cat"))


def test_the_manifest_names_every_file(published_folder: Path, tmp_path: Path) -> None:
    ours = convert(published_folder, tmp_path / "ours", max_shard_size="50KB")
    manifest = json.loads((ours / MANIFEST_NAME).read_text())
    files = {file.relative_to(ours).as_posix(): file for file in ours.rglob("*") if file.is_file()}
    assert set(manifest["files"]) == set(files) - {MANIFEST_NAME}
    for name, facts in manifest["files"].items():
        data = files[name].read_bytes()
        assert facts == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert (manifest["from"], manifest["to"]) == ("published", "unialignment")
    damaged = next(file for name, file in files.items() if name.startswith("transformer/") and file.suffix != ".json")
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x01")
    with pytest.raises(CheckpointError, match="damaged"):
        convert(ours, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_training_only_projectors_come_back(published_builder: Callable[..., Path], tmp_path: Path) -> None:
    source = published_builder(tmp_path / "source")
    file = source / "transformer" / "diffusion_pytorch_model.safetensors"
    state = load_file(file) | {"siglip_adapter_img.0.weight": torch.randn(3, 4)}
    save_file(state, file)
    ours = convert(source, tmp_path / "ours")
    assert "transformer/siglip_adapter_img.0.weight" not in read_entries(ours / "transformer")
    UniAlignmentPipeline.from_pretrained(ours, device="cpu")
    assert tensors(convert(ours, tmp_path / "back")) == tensors(source)


def test_types_survive(published_builder: Callable[..., Path], tmp_path: Path) -> None:
    source = published_builder(tmp_path / "source")
    for component, dtype in (
        ("transformer/diffusion_pytorch_model", torch.float16),
        ("text_encoder/model", torch.bfloat16),
    ):
        file = source / f"{component}.safetensors"
        save_file({name: value.to(dtype) for name, value in load_file(file).items()}, file, {"format": "pt"})
    ours = convert(source, tmp_path / "ours")
    assert {entry.dtype for entry in read_entries(ours / "transformer").values()} == {"F16"}
    assert tensors(convert(ours, tmp_path / "back")) == tensors(source)


def test_a_transformer_alone(published_folder: Path, tmp_path: Path) -> None:
    source = published_folder / "transformer"
    ours = convert(source, tmp_path / "transformer")
    assert json.loads((ours / "config.json").read_text())["_class_name"] == "UniAlignmentTransformer"
    back = convert(ours, tmp_path / "back")
    assert [*tensors(back).values()] == [*tensors(source).values()]
    assert json.loads((back / "config.json").read_text()) == json.loads((source / "config.json").read_text())


def test_what_cannot_be_said_is_refused(published_folder: Path, tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="T5TextEmbedder"):
        convert(tiny_folder, tmp_path / "out")
    with pytest.raises(CheckpointError, match="attention_mode='prefix'"):
        convert(tiny_folder / "transformer", tmp_path / "out")
    with pytest.raises(InputError, match="'unialignment' only"):
        convert(published_folder, tmp_path / "out", to="published")
    with pytest.raises(StorageError, match="something is there"):
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "a").touch()
        convert(published_folder, tmp_path / "full")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("missing", ["mask_token_emb_00001.pth", "vae/config.json", "text_encoder/model.safetensors"])
def test_half_a_download_writes_nothing(published_builder: Callable[..., Path], tmp_path: Path, missing: str) -> None:
    source = published_builder(tmp_path / "source")
    (source / missing).unlink()
    with pytest.raises(CheckpointError):
        convert(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_parts_of_two_models_are_not_put_together(
    published_builder: Callable[..., Path], make_text_encoder: Callable[..., None], tmp_path: Path
) -> None:
    source = published_builder(tmp_path / "source")
    shutil.rmtree(source / "text_encoder")
    make_text_encoder(source / "text_encoder", width=32)
    with pytest.raises(CheckpointError, match="32 wide and the transformer expects 48"):
        convert(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@torch.no_grad()
def velocity(pipe: UniAlignmentPipeline) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    config = pipe.transformer.config
    return pipe.transformer(
        latents=torch.randn(2, config.in_channels, 8, 8, generator=generator),
        text_embeds=torch.randn(2, 3, config.joint_attention_dim, generator=generator),
        timestep=torch.tensor([200.0, 900.0]),
    ).velocity


@pytest.mark.parametrize("layout", ["published", "unialignment", "prefix"])
def test_merged_equals_the_adapter(published_folder: Path, tiny_folder: Path, tmp_path: Path, layout: str) -> None:
    base = {"published": published_folder, "prefix": tiny_folder}.get(layout) or convert(
        published_folder, tmp_path / "o"
    )
    pipe = UniAlignmentPipeline.from_pretrained(base, device="cpu")
    plain = velocity(pipe)
    add_lora(pipe.transformer, rank=3, alpha=6, targets=("to_q", "to_k", "ff.net.2"))
    torch.manual_seed(1)
    for name, parameter in pipe.transformer.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    lora = save_lora(pipe.transformer, tmp_path / "lora")
    for scale in (1.0, 0.5):
        fresh = UniAlignmentPipeline.from_pretrained(base, device="cpu")
        load_lora(fresh.transformer, lora, scale)
        expected = velocity(fresh)
        assert not torch.allclose(expected, plain, atol=1e-2)
        report = merge_folder(base, lora, tmp_path / f"merged-{scale}", scale, max_shard_size="30KB")
        assert not report.unmatched
        merged = UniAlignmentPipeline.from_pretrained(tmp_path / f"merged-{scale}", device="cpu")
        torch.testing.assert_close(velocity(merged), expected, atol=1e-5, rtol=1e-5)


def test_commands(published_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(published_folder), "--out", str(tmp_path / "ours")]) == 0
    pipe = UniAlignmentPipeline.from_pretrained(tmp_path / "ours", device="cpu")
    add_lora(pipe.transformer, rank=2)
    save_lora(pipe.transformer, tmp_path / "lora")
    arguments = [str(tmp_path / "ours"), str(tmp_path / "lora"), "--out", str(tmp_path / "merged"), "--json"]
    capsys.readouterr()
    assert main(["merge", *arguments]) == 0
    assert len(json.loads(capsys.readouterr().out)["matched"]) == 24
    assert main(["merge", *arguments]) == 2
    assert "something is there already" in capsys.readouterr().err
    (file,) = (tmp_path / "lora").iterdir()
    strange = [f"strange{number}" for number in range(6)]
    save_file(load_file(file) | {name: torch.zeros(1) for name in strange}, file)
    assert main(["merge", *arguments[:2], "--out", str(tmp_path / "other")]) == 0
    said = capsys.readouterr().out
    assert all(f"unmatched {name}: not a LoRA weight" in said for name in strange)


def _trained(
    base: Path, folder: Path, seed: int, part: str = "transformer", share: str = "norm"
) -> dict[str, torch.Tensor]:
    """A run from ``base`` that has changed the tensors of one part whose names contain ``share``; the changes."""
    shutil.copytree(base, folder)
    (folder / CHECKSUMS_NAME).unlink(missing_ok=True)
    file = folder / part / "diffusion_pytorch_model.safetensors"
    state, dice = load_file(file), torch.Generator().manual_seed(seed)
    changes = {name: torch.randn(weight.shape, generator=dice) * 0.1 for name, weight in state.items() if share in name}
    assert changes
    save_file(
        state | {name: (state[name].float() + change).to(state[name].dtype) for name, change in changes.items()}, file
    )
    return changes


def test_runs_from_one_start_are_added(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tiny_folder
    one = _trained(base, tmp_path / "one", 1, share="to_q")
    two = _trained(base, tmp_path / "two", 2, share="attn")
    arguments = [str(base), "--run", f"{tmp_path / 'one'}", "--run", f"{tmp_path / 'two'}:0.5"]
    assert main(["merge", *arguments, "-o", str(tmp_path / "sum"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["changed"] == {"transformer": len(two), "text_embedder": 0}
    before, after = (
        load_file(f / "transformer" / "diffusion_pytorch_model.safetensors") for f in (base, tmp_path / "sum")
    )
    for name, weight in before.items():
        expected = weight.float() + one.get(name, 0) + 0.5 * two.get(name, torch.zeros(()))
        torch.testing.assert_close(after[name].float(), expected, atol=2e-3, rtol=1e-3)
    others = {k: v for k, v in tensors(tmp_path / "sum").items() if not k.startswith("transformer/")}
    assert others == {k: v for k, v in tensors(base).items() if not k.startswith("transformer/")}
    UniAlignmentPipeline.from_pretrained(tmp_path / "sum", device="cpu")
    # A run is written in float32, whatever its start was.
    half = tmp_path / "half"
    UniAlignmentPipeline.from_pretrained(base, device="cpu").save_pretrained(
        half, dtypes={"transformer": "float16", "autoencoder": "float16", "text_embedder": "float16"}
    )
    UniAlignmentPipeline.from_pretrained(half, device="cpu").save_pretrained(tmp_path / "full")
    assert add_runs(half, [(tmp_path / "full", 1.0)], tmp_path / "whole") == {"transformer": 0, "text_embedder": 0}
    # Nothing added is the start, bit for bit.
    add_runs(base, [(tmp_path / "one", 0.0), (base, 1.0)], tmp_path / "same")
    assert tensors(tmp_path / "same") == tensors(base)


def test_what_was_not_started_here_is_not_added(
    tiny_folder: Path, published_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _trained(tiny_folder, tmp_path / "latents", 1, part="autoencoder", share="")
    shutil.copytree(tiny_folder, tmp_path / "larger")
    file = tmp_path / "larger" / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file(load_file(file) | {"extra": torch.zeros(2)}, file)
    (tmp_path / "larger" / CHECKSUMS_NAME).unlink(missing_ok=True)
    shutil.copytree(tiny_folder, tmp_path / "words")
    (tmp_path / "words" / "tokenizer" / "tokenizer.json").write_text("{}")
    (tmp_path / "words" / CHECKSUMS_NAME).unlink()
    for run, message in (
        ("words", "other words"),
        ("latents", "wasn't started from"),
        ("larger", "other tensors"),
        (published_folder, "layout"),
    ):
        with pytest.raises(CheckpointError, match=message):
            add_runs(tiny_folder, [(tmp_path / run, 1.0)], tmp_path / "sum")
        assert not (tmp_path / "sum").exists()
    with pytest.raises(InputError, match="no runs"):
        add_runs(tiny_folder, [], tmp_path / "sum")
    out = ["-o", str(tmp_path / "sum")]
    assert main(["merge", str(tiny_folder), *out]) == 2
    assert main(["merge", str(tiny_folder), "a.safetensors", "--run", "b", *out]) == 2
    assert "either a LoRA or runs" in capsys.readouterr().err
    for wrong, message in (
        (["--run", str(tiny_folder), "--scale", "0.5"], "give each run its own"),
        (["--run", f"{tiny_folder}:nan"], "PATH:SCALE"),
        (["--run", str(tmp_path / "absent")], "no model"),
    ):
        assert main(["merge", str(tiny_folder), *wrong, *out]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "sum").exists()


@pytest.mark.parametrize(("text", "size"), [("24GiB", 24 * 2**30), ("1.5 MB", 1_500_000), ("7", 7), ("2g", 2**31)])
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size
    assert format_size(3 * 2**29) == "1.50 GiB"
    for bad in ("", "GiB", "-3MB", "12 parsecs", "nan"):
        with pytest.raises(InputError, match="not a size"):
            parse_size(bad)
