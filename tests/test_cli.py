from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unialignment import cli
from unialignment.metadata import read_metadata


@pytest.fixture
def run(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run a command in an empty folder; returns (exit code, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str, model: bool = True) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = cli.main([*arguments, *(["--model", str(tiny_folder), "--device", "cpu"] if model else [])])
        except SystemExit as error:
            code = int(error.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def dog(tmp_path: Path) -> str:
    array = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(array).save(tmp_path / "dog.png")
    return "dog.png"


FAST = ("--steps", "2", "--quiet")


def test_generate_writes_pictures_that_tell_how_they_were_made(run, tmp_path: Path):
    code, out, err = run("generate", "the dog", "--seed", "7", "-n", "2", *FAST)
    assert (code, err) == (0, "")
    assert out.split() == ["out/generate-7.png", "out/generate-8.png"]
    facts = read_metadata(tmp_path / "out/generate-8.png")
    assert (facts["prompt"], facts["seed"], facts["settings"]["num_inference_steps"]) == ("the dog", 8, 2)
    code, out, _ = run("info", "out/generate-7.png", model=False)
    assert "prompt: the dog" in out


def test_generate_does_not_overwrite_in_a_folder_but_obeys_a_file_name(run, tmp_path: Path):
    for _ in range(2):
        run("generate", "the dog", "--seed", "7", *FAST)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["generate-7-2.png", "generate-7.png"]
    for _ in range(2):
        assert run("generate", "the dog", "-o", "a.webp", *FAST)[1].strip() == "a.webp"
    assert run("generate", "the dog", "-n", "2", "-o", "b.png", *FAST)[1].split() == ["b-1.png", "b-2.png"]


def test_prompts_come_from_files_and_standard_input(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import io

    (tmp_path / "prompts.txt").write_text("the dog\n\na cat\n")
    code, out, _ = run("generate", "--prompts", "prompts.txt", "--seed", "1", "--json", *FAST)
    assert code == 0
    assert [image["prompt"] for image in json.loads(out)["images"]] == ["the dog", "a cat"]
    monkeypatch.setattr("sys.stdin", io.StringIO("a red cat\n"))
    assert run("generate", "--prompts", "-", *FAST)[0] == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ("edit", "replace the dog", "dog.png"),
        ("perceive", "dog.png", "dog.png"),
        ("perceive", "dog.png", "--kind", "segment", "--of", "the dog"),
        ("perceive", "dog.png", "--prompt", "segment the dog"),
        ("control", "the dog", "dog.png", "--kind", "depth"),
        ("control", "the dog", "dog.png"),
        ("compose", "the dog next to the cat", "dog.png", "dog.png"),
    ],
)
def test_every_picture_command_has_json(run, dog: str, arguments: tuple[str, ...]):
    code, out, err = run(*arguments, "--json", "--seed", "3", *FAST)
    assert (code, err) == (0, "")
    data = json.loads(out)
    assert data["command"] == arguments[0]
    assert data["seconds"] > 0
    for entry in data["images"]:
        assert Image.open(entry["path"]).size == (32, 32)
        assert entry["seed"] == 3
    assert len(data["images"]) == (2 if arguments.count("dog.png") == 2 and arguments[0] == "perceive" else 1)


@pytest.mark.parametrize(
    ("arguments", "count"),
    [
        (("caption", "dog.png", "dog.png"), 2),
        (("answer", "dog.png", "what is the dog", "what is on the cat"), 2),
        (("infill", "dog.png", "the ___ is a [MASK]"), 1),
        (("rewrite", "the dog", "a cat", "--seed", "3"), 2),
    ],
)
def test_every_text_command_prints_and_has_json(run, dog: str, arguments: tuple[str, ...], count: int):
    code, out, err = run(*arguments, *FAST)
    assert (code, err) == (0, "")
    assert len(out.splitlines()) == count
    data = json.loads(run(*arguments, "--json", *FAST)[1])
    assert len(data["texts"]) == count
    assert all(entry["text"] in out for entry in data["texts"])


def test_prompts_are_rewritten_on_demand(run):
    arguments = ("generate", "the dog", "--seed", "3", "-n", "2", "--json", *FAST)
    images = json.loads(run(*arguments, "--rewrite")[1])["images"]
    said = [json.loads(run("rewrite", "the dog", "--seed", seed, "--json")[1])["texts"][0]["text"] for seed in "34"]
    assert [image["revised_prompt"] for image in images] == said
    assert "revised_prompt" not in json.loads(run(*arguments, "--no-rewrite")[1])["images"][0]


def test_embed_compares_and_saves(run, dog: str, tmp_path: Path):
    code, out, _ = run("embed", "--image", dog, "--text", "the dog", "a cat")
    assert code == 0
    assert len(out.splitlines()) == 2
    data = json.loads(run("embed", "--image", dog, "--text", "the dog", "--json", "-o", "vectors.npy")[1])
    vectors = np.load(tmp_path / "vectors.npy")
    np.testing.assert_allclose(vectors, [entry["vector"] for entry in data["embeddings"]], rtol=1e-5)
    assert float(vectors[0] @ vectors[1]) == pytest.approx(data["similarity"][0][0], abs=1e-5)


def test_info_describes_installation_and_models(run, tiny_folder: Path):
    assert json.loads(run("info", "--json", model=False)[1])["unialignment"]
    data = json.loads(run("info", str(tiny_folder), "--json", model=False)[1])
    assert data["checksums"] == "verified"
    assert data["components"]["transformer"]["class"] == "UniAlignmentTransformer"
    assert data["components"]["transformer"]["parameters"] > 10_000


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("generate",), "give either a prompt"),
        (("generate", ""), "empty"),
        (("generate", "the dog", "-o", "a.tiff"), "can't save"),
        (("generate", "the dog", "--prompts", "x.txt"), "give either"),
        (("generate", "--prompts", "absent.txt"), "absent.txt"),
        (("generate", "the dog", "--steps", "0"), "num_inference_steps"),
        (("generate", "the dog", "--steps", "many"), "invalid int value"),
        (("generate", "the dog", "--guidance-interval", "0.9", "0.1"), "interval"),
        (("edit", "replace the dog"), "image"),
        (("edit", "replace the dog", "absent.png"), "no picture at absent.png"),
        (("edit", "replace the dog", "https://example.org/a.png"), "URLs are refused"),
        (("perceive", "dog.png", "--kind", "temperature"), "temperature"),
        (("perceive", "dog.png", "--kind", "segment"), "needs a prompt"),
        (("compose", "all", *["dog.png"] * 9), "9 given"),
        (("infill", "dog.png", "no gap here"), "no gap"),
        (("embed",), "give --image"),
        (("embed", "--text", "the dog", "-o", "a.txt"), ".npy"),
        (("paint", "a"), "unknown command 'paint'"),
        (("captoin", "a"), "did you mean caption"),
    ],
)
def test_mistakes_end_with_one_line_and_exit_code_2(run, dog: str, arguments: tuple[str, ...], words: str):
    code, out, err = run(*arguments)
    assert code == 2
    assert out == ""
    assert words in err
    assert err.count("\n") == 1
    assert "Traceback" not in err


def test_a_missing_model_is_one_line(run):
    code, _, err = run("generate", "the dog", "--model", "no-such-model", model=False)
    assert code == 2
    assert err.count("\n") == 1
    assert "no-such-model" in err


def test_ctrl_c_ends_with_130_and_leaves_nothing(run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    from unialignment.pipeline import UniAlignmentPipeline

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(UniAlignmentPipeline, "decode_latents", interrupt)
    code, out, err = run("generate", "the dog", *FAST)
    assert (code, out) == (130, "")
    assert err.strip() == "unialign: interrupted"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_explains_itself_with_an_example(name: str, capsys: pytest.CaptureFixture[str]):
    if name == "demo":
        pytest.importorskip("unialignment.demo")
    with pytest.raises(SystemExit) as caught:
        cli.main([name, "--help"])
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert f"unialign {name}" in text
    assert name == "demo" or " ".join(cli.COMMANDS[name].example.split()) in text
    assert name in ("world", "demo", "data", "serve") or "--json" in text


def test_help_answers_without_loading_anything_heavy():
    program = (
        "import sys\nfrom unialignment.cli import COMMANDS, main\n"
        "for name in ['', *(n for n in COMMANDS if n != 'demo')]:\n"
        "    try:\n        main([*name.split(), '--help'])\n    except SystemExit:\n        pass\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'numpy', 'PIL', 'pydantic'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_no_arguments_and_version(capsys: pytest.CaptureFixture[str]):
    assert cli.main([]) == 2
    out = capsys.readouterr().out
    assert all(name in out for name in cli.COMMANDS)
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert "unialign 0." in capsys.readouterr().out
