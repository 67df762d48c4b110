"""Configurations: what is refused, with which help, and that a resolved one reads back."""

from __future__ import annotations

from pathlib import Path

import pytest

from unialignment.errors import ConfigError
from unialignment.training.config import AutoencoderConfig, TransformerConfig, load_config, parse_overrides, to_yaml

MINIMAL = "kind: transformer\nrun: {max_steps: 5}\n"


@pytest.fixture()
def path(tmp_path: Path) -> Path:
    file = tmp_path / "config.yaml"
    file.write_text(MINIMAL)
    return file


def message(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value)


@pytest.mark.parametrize("name", ["tiny", "nano", "autoencoder"])
def test_shipped_configurations_are_valid_and_survive_a_round_trip(repo_root: Path, tmp_path: Path, name: str) -> None:
    config = load_config(repo_root / "configs" / f"{name}.yaml")
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(to_yaml(config))
    assert load_config(resolved) == config
    assert isinstance(config, AutoencoderConfig if name == "autoencoder" else TransformerConfig)


def test_overrides_reach_nested_fields_with_their_types(path: Path) -> None:
    config = load_config(
        path, ["optimizer.lr=5e-4", "mixture={generate: 3, edit: 0}", "run.compile=on", "flow.shift=2", "run.dir=/x/y"]
    )
    assert config.optimizer.lr == 5e-4  # YAML 1.1 reads 5e-4 as a string
    assert config.mixture == {"generate": 3, "edit": 0} | {
        k: v for k, v in config.mixture.items() if k not in ("generate", "edit")
    }
    assert config.run.compile == "on" and config.flow.shift == 2.0 and config.run.folder == Path("/x/y")


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("optimizer.learning_rate=1", "optimizer"),
        ("optimiser.lr=1", "'optimizer'"),
        ("optimizer.weight_deacy=1", "'optimizer.weight_decay'"),
        ("lr=1", "'optimizer.lr'"),
        ("run.max_step=1", "'run.max_steps'"),
        ("warmup_steps=3", "'optimizer.warmup_steps'"),
    ],
)
def test_an_unknown_key_names_the_nearest_known_one(path: Path, override: str, nearest: str) -> None:
    text = message(path, override)
    assert "unknown key" in text and nearest in text and str(path) in text


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optimizer.lr=fast", ("optimizer.lr", "number", "fast")),
        ("optimizer.lr=-1", ("optimizer.lr", "greater than 0")),
        ("ema.decay=1", ("ema.decay", "less than 1")),
        ("run.precision=fp8", ("run.precision", "fp32", "bf16")),
        ("mixture={generat: 3}", ("generat", "did you mean 'generate'")),
        ("mixture.generate=-1", ("mixture.generate", "greater than or equal to 0")),
        ("run.max_steps=0", ("run.max_steps",)),
        ("kind=transfomer", ("kind", "autoencoder", "transformer")),
        ("optimizer=3", ("optimizer",)),
        ("no-equals-sign", ("key=value",)),
        ("a=[1,", ("not valid YAML",)),
    ],
)
def test_a_bad_value_says_where_what_and_why(path: Path, override: str, words: tuple[str, ...]) -> None:
    text = message(path, override)
    assert all(word in text for word in words), text
    assert "\n" not in text


@pytest.mark.parametrize("override", ["run.keep_best=1", "run.activation_checkpointing=true", "run.parallel=ddp"])
def test_an_autoencoder_is_not_told_what_it_does_not_do(repo_root: Path, override: str) -> None:
    text = message(repo_root / "configs" / "autoencoder.yaml", override)
    assert override.partition("=")[0] in text and "leave it out" in text


def test_a_run_without_end_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "endless.yaml"
    file.write_text("kind: transformer\nrun: {name: x}\n")
    assert "budget_seconds" in message(file) and "max_steps" in message(file)


def test_unusable_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "nano.yaml").write_text(MINIMAL)
    assert "nano.yaml" in message(tmp_path / "nanno.yaml")
    contents = {"list": "- 1", "syntax": "run: {", "twice": "run: {max_steps: 1}\nrun: {max_steps: 2}"}
    for name, content in contents.items():
        file = tmp_path / f"{name}.yaml"
        file.write_text(content)
        text = message(file)
        assert str(file) in text and "\n" not in text
    assert "twice" in message(tmp_path / "twice.yaml")
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00\x80")
    assert "Cannot read" in message(binary)


def test_conflicting_overrides_are_refused() -> None:
    with pytest.raises(ConfigError, match="contradicts"):
        parse_overrides(["run=3", "run.name=x"])


def test_a_section_given_whole_keeps_its_single_keys() -> None:
    assert parse_overrides(["run.dir=/x", "run={max_steps: 3}"]) == {"run": {"dir": "/x", "max_steps": 3}}
