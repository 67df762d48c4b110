"""Parity with the published model, through the public loader: its own tensors, and other sizes built here."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel
from diffusers.models.attention import JointTransformerBlock
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import unialignment
from unialignment.model.cache import TransformerOutput
from unialignment.model.published import load_transformer
from unialignment.model.transformer import UniAlignmentTransformer

NAMES = ("velocity", "text_logits", "image_features", "text_features")


# ------------------------------------------------------------------------------------------------ the published tensors


@pytest.fixture(scope="module")
def official(shared_dir: Path, tmp_path_factory: pytest.TempPathFactory, published_folder: Path, make_tokenizer):
    """The published tiny transformer inside a whole pipeline folder, loaded as users load one; and its cases."""
    source = shared_dir / "parity" / "official-tiny"
    if not source.is_dir():
        pytest.skip("the parity tensors are not at hand")
    folder = tmp_path_factory.mktemp("official") / "pipeline"
    shutil.copytree(published_folder, folder, ignore=shutil.ignore_patterns("transformer", "tokenizer"))
    (folder / "transformer").mkdir()
    for file in (source / "transformer").iterdir():
        shutil.copyfile(file, folder / "transformer" / file.name)
    make_tokenizer(folder / "tokenizer", size=97)
    return unialignment.load(folder).transformer, load_file(source / "cases.safetensors")


def run(model: UniAlignmentTransformer, x: dict[str, Tensor], case: str, rows: slice) -> TransformerOutput:
    sources = {"edit": ["source_1"], "compose": ["source_1", "source_2", "source_3"]}.get(case, [])
    text_only = case in ("understand", "text_only")
    with torch.no_grad():
        return model(
            text_embeds=x["text_embeds"][rows],
            latents=None if case == "text_only" else x["latents"][rows],
            sources=[x[name][rows] for name in sources],
            timestep=torch.zeros_like(x["timestep"][rows]) if text_only else x["timestep"][rows],
            target="text" if text_only else "both",
        )


def test_every_published_tensor_is_matched(official: tuple[UniAlignmentTransformer, dict[str, Tensor]]) -> None:
    model, tensors = official
    latents = tensors["latents"]
    assert latents.shape[-2] != latents.shape[-1]
    compared = set()
    for case in sorted({name.split(".")[0] for name in tensors if "." in name}):
        output = run(model, tensors, case, slice(None))
        for name in (name for name in tensors if name.startswith(f"{case}.")):
            value = getattr(output, name.split(".")[1])
            if value is None:  # the published code runs both heads always; ours only the one that is asked for
                output = model(
                    **{"text_embeds": tensors["text_embeds"], "latents": latents, "target": "both"},
                    timestep=torch.zeros_like(tensors["timestep"]),
                )
                value = getattr(output, name.split(".")[1])
            torch.testing.assert_close(value, tensors[name], atol=1e-4, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
            compared.add(name)
    assert compared == {name for name in tensors if "." in name} and len(compared) >= 14


def test_the_transformer_alone_loads_from_the_package(shared_dir: Path) -> None:
    """By the one line that the documentation gives, from a folder that holds nothing but the transformer."""
    from unialignment.model import UniAlignmentTransformer as Exported

    source = shared_dir / "parity" / "official-tiny"
    if not source.is_dir():
        pytest.skip("the parity tensors are not at hand")
    tensors = load_file(source / "cases.safetensors")
    for model in (
        Exported.from_pretrained(str(source), subfolder="transformer"),
        Exported.from_pretrained(source / "transformer"),
    ):
        assert not model.training and model.dtype == torch.float32
        output = run(model, tensors, "edit", slice(None))
        torch.testing.assert_close(output.velocity, tensors["edit.velocity"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", ["generate", "edit", "compose", "understand", "text_only"])
def test_a_batch_of_one_is_the_same(official: tuple[UniAlignmentTransformer, dict[str, Tensor]], case: str) -> None:
    model, tensors = official
    for row in range(tensors["latents"].shape[0]):
        output = run(model, tensors, case, slice(row, row + 1))
        for name in NAMES:
            if f"{case}.{name}" in tensors and getattr(output, name) is not None:
                expected = tensors[f"{case}.{name}"][row : row + 1]
                torch.testing.assert_close(getattr(output, name), expected, atol=1e-4, rtol=0)


# ------------------------------------------------------------------------------------- other sizes, against real blocks


class Reference(nn.Module):
    """What the published architecture computes, assembled from diffusers' own parts under the published names."""

    def __init__(self, vocab_size: int, null_tokens: int, flavour: dict[str, Any], **sizes: int) -> None:
        super().__init__()
        dim = sizes["attention_head_dim"] * sizes["num_attention_heads"]
        base = SD3Transformer2DModel(**sizes, **flavour, caption_projection_dim=dim, pooled_projection_dim=8)
        self.pos_embed, self.context_embedder = base.pos_embed, base.context_embedder
        last = JointTransformerBlock(
            *(dim, sizes["num_attention_heads"], sizes["attention_head_dim"]),
            qk_norm=flavour.get("qk_norm"),
            use_dual_attention=sizes["num_layers"] - 1 in flavour.get("dual_attention_layers", ()),
        )
        self.transformer_blocks = nn.ModuleList([*base.transformer_blocks[:-1], last])
        self.time_text_embed = base.time_text_embed
        del self.time_text_embed.text_embedder
        self.image_norm_out, self.image_proj_out = base.norm_out, base.proj_out
        self.text_proj_out = nn.Linear(dim, vocab_size)
        self.null_image_embd = nn.Parameter(torch.randn(1, null_tokens, dim))
        self.patch = sizes["patch_size"]
        for name, parameter in self.named_parameters():
            mean = 1.0 if re.search(r"\.norm_(added_)?[qk]\.", name) else 0.0
            nn.init.normal_(parameter, mean, 0.5 / parameter.shape[-1] ** 0.5 if parameter.ndim > 1 else 0.1)

    @torch.no_grad()
    def forward(
        self, latents: Tensor | None, text: Tensor, timestep: Tensor, sources: tuple[Tensor, ...] = ()
    ) -> dict[str, Tensor]:
        pictures = [self.pos_embed(picture) for picture in (latents, *sources) if picture is not None]
        image = torch.cat(pictures, 1) if pictures else self.null_image_embd.expand(len(text), -1, -1)
        time = self.time_text_embed.timestep_embedder(self.time_text_embed.time_proj(timestep))
        text = self.context_embedder(text)
        for block in self.transformer_blocks:
            text, image = block(image, text, time)
        text = nn.functional.layer_norm(text, text.shape[-1:], eps=1e-6)
        output = {"text_features": text, "text_logits": self.text_proj_out(text)}
        if latents is not None:
            height, width, p = latents.shape[-2] // self.patch, latents.shape[-1] // self.patch, self.patch
            image = self.image_norm_out(image[:, : height * width], time)
            grid = self.image_proj_out(image).reshape(len(image), height, width, p, p, -1)
            velocity = grid.permute(0, 5, 1, 3, 2, 4).reshape(len(image), -1, height * p, width * p)
            output |= {"image_features": image, "velocity": velocity}
        return output


_ARGUMENTS = (
    *("num_layers", "attention_head_dim", "num_attention_heads", "joint_attention_dim"),
    *("in_channels", "out_channels", "patch_size", "pos_embed_max_size"),
)
SIZES = {  # vocabulary, sample size, the arguments above, latent height and width, batch, text length
    "narrow": (11, 4, (1, 8, 3, 20, 3, 3, 1, 9), (6, 9), 1, 1),
    "wide": (300, 16, (2, 64, 2, 96, 16, 16, 2, 24), (16, 8), 2, 33),
    "deep": (50, 32, (9, 16, 2, 32, 4, 8, 2, 192), (32, 32), 3, 7),
    "large patches": (64, 12, (3, 32, 1, 24, 8, 8, 4, 5), (20, 8), 1, 128),
    "3.5": (40, 8, (4, 16, 3, 24, 6, 6, 2, 12), (8, 20), 2, 11),
    "3.5 to the last block": (40, 8, (3, 24, 2, 16, 5, 5, 3, 7), (9, 21), 1, 300),
}
FLAVOURS: dict[str, dict[str, Any]] = {
    "3.5": {"qk_norm": "rms_norm", "dual_attention_layers": (0, 2)},
    "3.5 to the last block": {"qk_norm": "rms_norm", "dual_attention_layers": (1, 2)},
}


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("name", SIZES)
def test_other_sizes_match_the_architecture(tmp_path: Path, name: str, sharded: bool) -> None:
    vocab_size, sample_size, values, shape, batch, length = SIZES[name]
    sizes = dict(zip(_ARGUMENTS, values, strict=True))
    flavour = FLAVOURS.get(name, {})
    torch.manual_seed(len(name))
    # How many null-image tokens there are isn't in a published config.
    reference = Reference(vocab_size, 1 + len(name), flavour, sample_size=sample_size, **sizes).eval()
    config = {"_class_name": "SD3JointModelFlexible", "vocab_size": vocab_size, "sample_size": sample_size, **sizes}
    config |= {"caption_projection_dim": sizes["attention_head_dim"] * sizes["num_attention_heads"]}
    config |= {"dual_attention_layers": list(flavour.get("dual_attention_layers", ()))}
    config |= {"_use_default_values": ["num_layers", "in_channels", "qk_norm"], "qk_norm": flavour.get("qk_norm")}
    (tmp_path / "config.json").write_text(json.dumps(config))
    state = {key: value.clone() for key, value in reference.state_dict().items()}
    if sharded:
        shards = {key: f"diffusion_pytorch_model-{1 + i % 2:05d}-of-00002.safetensors" for i, key in enumerate(state)}
        for shard in set(shards.values()):
            save_file({key: value for key, value in state.items() if shards[key] == shard}, tmp_path / shard)
        index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
        index.write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    else:
        save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
    for model in (load_transformer(tmp_path), UniAlignmentTransformer.from_pretrained(tmp_path).eval()):
        generator = torch.Generator().manual_seed(3)
        pictures = [torch.randn(batch, sizes["in_channels"], *shape, generator=generator) for _ in range(3)]
        text = torch.randn(batch, length, sizes["joint_attention_dim"], generator=generator)
        timestep = torch.rand(batch, generator=generator) * 1000
        for sources in ((), (pictures[1],), tuple(pictures[1:])):
            expected = reference(pictures[0], text, timestep, sources)
            with torch.no_grad():
                output = model(text_embeds=text, latents=pictures[0], sources=sources, timestep=timestep, target="both")
            for key in NAMES:
                torch.testing.assert_close(getattr(output, key), expected[key], atol=1e-4, rtol=0)
        with torch.no_grad():
            output = model(text_embeds=text, timestep=timestep * 0, target="text")
        expected = reference(None, text, timestep * 0)
        torch.testing.assert_close(output.text_logits, expected["text_logits"], atol=1e-4, rtol=0)


def test_training_only_projectors_are_left_out(tmp_path: Path, published_folder: Path) -> None:
    shutil.copytree(published_folder / "transformer", tmp_path / "transformer")
    path = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    save_file(state | {"siglip_adapter_img.fc.0.weight": torch.ones(4, 4)}, path)
    loaded = load_transformer(tmp_path / "transformer").state_dict()
    assert set(loaded) == set(state) and all(torch.equal(loaded[name], state[name]) for name in state)
    with_diffusers = UniAlignmentTransformer.from_pretrained(tmp_path, subfolder="transformer")
    assert set(with_diffusers.state_dict()) == set(state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loading_in_half_precision_rounds_once(published_folder: Path, dtype: torch.dtype) -> None:
    loaded = load_transformer(published_folder / "transformer", dtype)
    state = load_file(published_folder / "transformer" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(value, state[name].to(dtype)) for name, value in loaded.state_dict().items())


def test_the_package_exports_the_model() -> None:
    """Whoever has the weights but no parity tensors at hand; importing the package alone stays light."""
    import unialignment.model

    assert unialignment.model.UniAlignmentTransformer is UniAlignmentTransformer
    assert unialignment.model.TransformerOutput is TransformerOutput
    with pytest.raises(ImportError, match="UniAlignmentPipeline"):
        exec("from unialignment.model import UniAlignmentPipeline")
    code = "import sys, unialignment.model; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
