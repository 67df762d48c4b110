"""Other people's models as contestants: a diffusers pipeline, a server of pictures and chat, the documented adapter."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from unialignment.errors import CheckpointError, InputError
from unialignment.evaluation import harness
from unialignment.evaluation.benchmarks import Benchmark, Item
from unialignment.evaluation.judges import JudgeUnavailable
from unialignment.evaluation.models import build


def photo(path: Path) -> Path:
    Image.new("RGB", (16, 12), "blue").save(path)
    return path


def item(kind: Any, photo: Path | None, *turns: str) -> Item:
    return Item(f"{kind}/1", kind, kind, " ".join(turns), turns, photo, 5)


# --- the documented adapter ------------------------------------------------------------------------------------------


def test_the_documented_adapter(repo_root: Path, tmp_path: Path) -> None:
    model = build(f"python:{repo_root / 'examples/evaluation/my_model.py'}:MyModel")
    items = (item("edit", photo(tmp_path / "p.png"), "make it grey"), item("generate", None, "a dog"))
    harness.generate(tmp_path / "run", Benchmark("b", ("edit", "generate"), items, "f"), model)
    with Image.open(tmp_path / "run" / "pictures" / "edit" / "1.png") as picture:
        red, green, blue = picture.getpixel((0, 0))
        assert red == green == blue
    assert model.tell(Image.new("RGB", (4, 4)), "is it?", "", 0) == "yes"
    with pytest.raises(InputError, match="can't make the model"):
        build(f"python:{tmp_path / 'none.py'}:MyModel")


# --- diffusers -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipeline_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random pipeline of diffusers, small enough to build in a test."""
    import torch
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("peer")
    words = ["a", "dog", "cat", "red"]
    vocabulary = ["<|startoftext|>", "<|endoftext|>", *"abcdefghijklmnopqrstuvwxyz"]
    vocabulary += [f"{letter}</w>" for letter in "abcdefghijklmnopqrstuvwxyz"] + words
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16)
    config = CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        projection_dim=16,
        bos_token_id=0,
        eos_token_id=1,
    )
    encoder = CLIPTextModelWithProjection(config)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        pos_embed_max_size=16,
    )
    vae = AutoencoderKL(
        block_out_channels=(8,),
        latent_channels=4,
        norm_num_groups=4,
        sample_size=8,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0,
        scaling_factor=1.0,
    )
    pipe = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=encoder,
        tokenizer=tokenizer,
        text_encoder_2=encoder,
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
        image_encoder=None,
        feature_extractor=None,
    )
    pipe.save_pretrained(folder / "model")
    return folder / "model"


def test_a_diffusers_pipeline(pipeline_folder: Path, tmp_path: Path) -> None:
    options = {"num_inference_steps": 1, "height": 8, "width": 8, "max_sequence_length": 16}
    model = build(f"diffusers:{pipeline_folder}", "cpu", options)
    dog, cat = item("generate", None, "a dog"), item("generate", None, "a red cat")
    first, again, other = (np.asarray(model.draw(one, seed)[0]) for one, seed in ((dog, 1), (dog, 1), (dog, 2)))
    assert first.shape == (8, 8, 3)
    assert (first == again).all() and (first != other).any()
    assert (first != np.asarray(model.draw(cat, 1)[0])).any()
    assert model.identity() == build(f"diffusers:{pipeline_folder}", "cpu", options).identity()
    assert model.identity()["class"] == "StableDiffusion3Pipeline"
    with pytest.raises(InputError, match="takes no image"):
        model.draw(item("edit", photo(tmp_path / "p.png"), "make it red"), 1)


def test_what_is_no_pipeline_is_said_to_be(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="can't load"):
        build(f"diffusers:{tmp_path}")


# --- a server --------------------------------------------------------------------------------------


class Server(ThreadingHTTPServer):
    """Pictures and chat; records what it is asked. ``fail`` lists status codes to send first."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.seen: list[tuple[str, bytes]] = []
        self.fail: list[int] = []
        self.by_url = False
        self.url = f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        server = self.server
        assert isinstance(server, Server)
        body = self.rfile.read(int(self.headers["Content-Length"]))
        server.seen.append((self.path, body))
        status, data = 200, {}
        if server.fail:
            status, data = server.fail.pop(0), {"error": {"message": "not that"}}
        elif self.path.endswith("/chat/completions"):
            message = {"role": "assistant", "content": " a dog "}
            choice = {"index": 0, "finish_reason": "stop", "message": message}
            data = {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
        else:
            buffer = io.BytesIO()
            Image.new("RGB", (8, 8), "red" if self.path.endswith("/edits") else "green").save(buffer, "PNG")
            encoded = base64.b64encode(buffer.getvalue()).decode()
            data = {"created": 0, "data": [{"url": "http://x/y.png"} if server.by_url else {"b64_json": encoded}]}
        sent = json.dumps(data).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(sent)))
        self.end_headers()
        self.wfile.write(sent)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    one = Server()
    threading.Thread(target=one.serve_forever, daemon=True).start()
    yield one
    one.shutdown()
    one.server_close()


def test_a_server_draws_edits_and_tells(server: Server, tmp_path: Path) -> None:
    model = build(f"openai:painter@{server.url}", options={"num_inference_steps": 3})
    picture, _ = model.draw(item("generate", None, "a dog"), 7)
    assert picture.getpixel((0, 0)) == (0, 128, 0)
    sent = json.loads(server.seen[-1][1])
    assert sent | {"model": "painter", "prompt": "a dog", "seed": 7, "num_inference_steps": 3} == sent
    picture, _ = model.draw(item("edit", photo(tmp_path / "p.png"), "redder", "and redder"), 7)
    assert picture.getpixel((0, 0)) == (255, 0, 0)
    assert [path for path, _ in server.seen[-2:]] == ["/v1/images/edits"] * 2
    assert b"\x89PNG" in server.seen[-1][1] and b"and redder" in server.seen[-1][1]
    assert model.tell(picture, "what is it?", "One word.", 0) == "a dog"
    asked = json.loads(server.seen[-1][1])["messages"][0]["content"]
    assert asked[0]["text"] == "what is it?\nOne word."
    assert model.identity()["url"] == server.url


def test_one_refused_item_is_recorded_and_a_failing_server_stops_the_run(server: Server, tmp_path: Path) -> None:
    model = build(f"openai:painter@{server.url}")
    items = tuple(Item(f"g/{n}", "g", "generate", "a dog", ("a dog",), None, n) for n in range(3))
    bench = Benchmark("b", ("g",), items, "f")
    server.fail = [400]
    harness.generate(tmp_path / "run", bench, model, limit=2)
    lines = [json.loads(line) for line in (tmp_path / "run" / "generated.jsonl").read_text().splitlines()]
    assert [line["status"] for line in lines] == ["error", "ok"] and "not that" in lines[0]["error"]
    server.fail = [401]
    with pytest.raises(JudgeUnavailable, match="refuses"):
        harness.generate(tmp_path / "run", bench, model)
    harness.generate(tmp_path / "run", bench, model)
    assert len((tmp_path / "run" / "generated.jsonl").read_text().splitlines()) == 3


def test_pictures_behind_urls_are_not_fetched(server: Server) -> None:
    server.by_url = True
    with pytest.raises(InputError, match="URLs are not fetched"):
        build(f"openai:painter@{server.url}").draw(item("generate", None, "a dog"), 1)
