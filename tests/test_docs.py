"""README and documentation: their commands exist and run, their Python runs, their links lead somewhere."""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from unialignment.cli import COMMANDS, main
from unialignment.training.ablation.config import AblationConfig
from unialignment.training.config import AutoencoderConfig, TransformerConfig

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BUNDLED = (ROOT / "src/unialignment/weights/nano/model_index.json").exists()
needs_weights = pytest.mark.skipif(not BUNDLED, reason="no bundled weights in this checkout")
LONG_RUNNING = {"train", "eval", "card", "world", "demo", "serve"}


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def commands(page: Path) -> list[list[str]]:
    lines = [line for block in blocks(page, "console") for line in block.splitlines()]
    return [shlex.split(line) for line in lines if line.startswith("unialign ")]


def parse(command: list[str]) -> argparse.Namespace:
    """Parse without running. An unusable command leaves through SystemExit."""
    entry = COMMANDS[command[1]]
    parser = argparse.ArgumentParser(prog=command[1])
    module = importlib.import_module(f"unialignment.commands.{entry.run.partition(':')[0]}")
    if entry.configure is not None:
        getattr(module, entry.configure)(parser)
    return parser.parse_args(command[2:])


EVERY = [(page.name, command) for page in PAGES for command in commands(page)]


def test_the_readme_shows_every_command_of_its_tasks() -> None:
    shown = {command[1] for command in commands(ROOT / "README.md")}
    assert shown >= {
        "generate",
        "edit",
        "perceive",
        "control",
        "compose",
        "caption",
        "answer",
        "infill",
        "embed",
        "train",
    }


@pytest.mark.parametrize(("page", "command"), EVERY, ids=[f"{page}: {' '.join(c)[:60]}" for page, c in EVERY])
def test_commands_parse(page: str, command: list[str]) -> None:
    parse(command)


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_of_the_help_parse(name: str) -> None:
    parse(shlex.split(COMMANDS[name].example))


def test_a_misspelt_command_would_be_noticed() -> None:
    with pytest.raises(SystemExit):
        parse(["unialign", "generate", "a dog", "--sed", "1", "--unknown"])


def test_configurations_of_commands_exist() -> None:
    for _, command in EVERY:
        if command[1] == "train":
            assert (ROOT / command[2]).is_file()


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for page in PAGES:
        for target in re.findall(r"(?:^|`)make (\w+)", page.read_text(), re.MULTILINE):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), (page, target)


@needs_weights
@pytest.mark.slow
def test_the_readmes_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for command in commands(ROOT / "README.md"):
        if command[1] in LONG_RUNNING:
            continue
        assert main(command[1:]) == 0, command
        if "-o" in command:
            assert Path(command[command.index("-o") + 1]).is_file()


@needs_weights
@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", "docs/tutorial.md", "docs/evaluation.md"])
def test_python_on_the_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pack) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    found = blocks(ROOT / page, "python")
    assert found
    for block in found:
        exec(compile(block, page, "exec"), names)


def test_the_worked_task_runs(tiny_pipeline, pack, nano, renderer) -> None:
    from unialignment.tasks import TASKS
    from unialignment.world.layout import sample_scene

    names: dict = {}
    try:
        for block in blocks(ROOT / "docs/adding-a-task.md", "python"):
            exec(compile(block, "adding-a-task.md", "exec"), names)
        picture = np.zeros((64, 64, 3), np.uint8)
        assert len(tiny_pipeline.spotlight("the dog", picture, num_inference_steps=1).images) == 1
        rng = np.random.default_rng(0)
        sample = names["make_spotlight"](sample_scene(rng, nano, "train"), rng, renderer)
        task = TASKS.get(sample.task)
        task.check_sources(len(sample.sources))
        assert task.condition_text(sample.prompt.removeprefix("spotlight on ")) == sample.prompt
        kept = (sample.target_image == sample.sources[0]).all(axis=-1)
        assert 0 < kept.mean() < 1
    finally:
        TASKS._tasks.pop("spotlight", None)


def config_keys(model: type, prefix: str = "") -> list[str]:
    keys = []
    for name, entry in model.model_fields.items():
        if isinstance(entry.annotation, type) and hasattr(entry.annotation, "model_fields"):
            keys += config_keys(entry.annotation, f"{prefix}{name}.")
        else:
            keys.append(prefix + name)
    return keys


def test_the_reference_is_complete() -> None:
    text = (ROOT / "docs/reference.md").read_text()
    missing = [name for name in COMMANDS if f"| `{name}` |" not in text]
    kinds = (TransformerConfig, AutoencoderConfig, AblationConfig)
    keys = {key for kind in kinds for key in config_keys(kind)} - {"kind"}
    missing += [key for key in keys if f"| `{key}` |" not in text]
    assert not missing
    documented = set(re.findall(r"^\| `([a-z_.]+)` \|", text, re.MULTILINE))
    assert documented <= keys | set(COMMANDS), documented - keys - set(COMMANDS)


def test_links_lead_somewhere() -> None:
    broken = []
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text()):
            path = (page.parent / target).resolve()
            if not path.exists() and not ("weights/nano" in str(path) and not BUNDLED):
                broken.append((page.name, target))
    assert not broken
