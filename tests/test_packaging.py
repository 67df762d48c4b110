"""What ships: metadata, pins, commands of the Makefile and of continuous integration, licences, sizes."""

from __future__ import annotations

import re
import stat
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import unialignment

EXTRAS = {"train", "world", "serve", "web", "ray", "quantize", "eval", "dev"}
INSTALLED_BY_MAKE = ("train", "world", "eval", "serve", "web", "quantize", "dev")
WEIGHTS_LIMIT = 40 * 10**6
PACKAGE_LIMIT = 50_000_000
"""Bytes of all bundled models together."""


@pytest.fixture(scope="module")
def project(repo_root: Path) -> dict:
    return tomllib.loads((repo_root / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def pins(repo_root: Path) -> dict[str, str]:
    lines = (repo_root / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_metadata(project: dict) -> None:
    assert project["version"] == unialignment.__version__
    assert project["requires-python"] == ">=3.11"
    assert set(project["optional-dependencies"]) == EXTRAS
    assert project["scripts"] == {"unialign": "unialignment.cli:main"}


def test_every_requirement_is_pinned_within_its_range(project: dict, pins: dict[str, str]) -> None:
    listed = [*project["dependencies"], *(line for extra in EXTRAS for line in project["optional-dependencies"][extra])]
    for requirement in map(Requirement, listed):
        assert canonical(requirement.name) in pins, requirement
        assert requirement.specifier.contains(pins[canonical(requirement.name)]), requirement


def test_pins_are_exact_and_name_no_build_of_torch(pins: dict[str, str]) -> None:
    assert pins["torch"] == "2.13.0"
    assert all(re.fullmatch(r"[0-9][0-9a-z.]*", version) for version in pins.values())


def test_everything_installed_by_make_is_pinned(project: dict, pins: dict[str, str]) -> None:
    """Follows installed requirements from what the Makefile installs; each has to have a pin."""
    todo = [Requirement(line) for line in project["dependencies"]]
    todo += [Requirement(line) for extra in INSTALLED_BY_MAKE for line in project["optional-dependencies"][extra]]
    seen: set[str] = set()
    while todo:
        name = canonical(todo.pop().name)
        if name in seen:
            continue
        seen.add(name)
        try:
            found = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        assert name in pins or name == "setuptools", f"{name} is installed and has no pin in constraints.txt"
        requirements = [Requirement(line) for line in found.requires or []]
        todo += [item for item in requirements if item.marker is None or item.marker.evaluate({"extra": ""})]


def test_ci_runs_exactly_the_readmes_test_command(repo_root: Path) -> None:
    script = repo_root / ".ci" / "run"
    assert script.stat().st_mode & stat.S_IXUSR
    assert script.read_text().splitlines()[-1] == "exec make test"
    assert "```console\nmake test\n```" in (repo_root / "README.md").read_text()


@pytest.mark.parametrize("target", ["demo", "test", "install", "lint", "types", "tests", "world", "card"])
def test_makefile_has_the_target(repo_root: Path, target: str) -> None:
    assert re.search(rf"^{target}:", (repo_root / "Makefile").read_text(), re.MULTILINE)


def test_bundled_weights_are_small_and_safe(repo_root: Path) -> None:
    weights = repo_root / "src/unialignment/weights"
    files = [path for path in weights.rglob("*") if path.is_file()]
    for model in {path.relative_to(weights).parts[0] for path in files}:
        assert sum(path.stat().st_size for path in files if path.is_relative_to(weights / model)) <= WEIGHTS_LIMIT
    assert sum(path.stat().st_size for path in files) <= PACKAGE_LIMIT
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".md", ".png"}


def test_licences(repo_root: Path) -> None:
    licence = (repo_root / "LICENSE").read_text()
    assert "Apache License" in licence
    assert "END OF TERMS AND CONDITIONS" in licence
    notice = (repo_root / "NOTICE").read_text()
    for name, terms in {
        "Noto Emoji": "Apache-2.0",
        "Fluent Emoji": "MIT",
        "Twemoji": "CC-BY-4.0",
        "OpenMoji": "CC-BY-SA-4.0",
        "emojibase": "MIT",
        "EfficientNet-Lite0": "Apache-2.0",
        "MiniLM": "Apache-2.0",
    }.items():
        assert name in notice
        assert terms in notice[notice.index(name) :]


def tracked(repo_root: Path) -> list[Path]:
    try:
        names = subprocess.run(["git", "ls-files"], cwd=repo_root, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout: which files belong to the repository is unknown")
    return [repo_root / name for name in names.splitlines()]


def test_no_artwork_and_no_machine_in_the_repository(repo_root: Path) -> None:
    files = [path for path in tracked(repo_root) if path.exists()]
    assert files
    assert not [path for path in files if path.suffix in {".svg", ".webp", ".pack", ".pkl", ".pt", ".ckpt"}]
    machine = re.compile(r"(?<![\w.~])/(?:work|root|home/\w+|farm)/")
    for path in files:
        if path.suffix in {".py", ".md", ".toml", ".yaml", ".txt", ".json"} or path.name in {"Makefile", "run"}:
            found = machine.search(path.read_text(encoding="utf-8"))
            assert path.name == Path(__file__).name or not found, f"{path}: {found}"


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, unialignment, unialignment.cli; sys.exit('torch' in sys.modules or 'diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
