"""The benchmark's own mechanics: turns, ratios, exponents, results on disk, bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from unialignment.benchmarking.measure import Machine, Timing, exponent, interleave, ratio
from unialignment.benchmarking.models import tokens_of
from unialignment.benchmarking.workloads import Case, peer
from unialignment.cli import main
from unialignment.errors import InputError


def test_runs_take_turns() -> None:
    order: list[str] = []
    seconds = interleave({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, repeats=3, warm_up=1)
    assert order == ["a", "b", "a", "b", "b", "a", "a", "b"]
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}


def test_ratios_are_paired() -> None:
    """A machine that gets twice as slow midway changes no ratio."""
    assert ratio([3.0, 6.0, 3.0], [1.0, 2.0, 1.0]) == Timing(3.0, 3.0, 3.0, 3)


def test_exponents_are_slopes() -> None:
    sizes = [1.0, 2.0, 4.0, 8.0]
    assert exponent(sizes, [5 * size**1.5 for size in sizes]) == pytest.approx(1.5)


def test_the_roofline_is_the_larger_of_both_bounds() -> None:
    machine = Machine("x", 1, "2", {"float32": 100.0}, 10.0)
    assert machine.bound(1000.0, 10.0, "float32") == 10.0
    assert machine.bound(1000.0, 1000.0, "float32") == 100.0


def test_pixels_become_tokens() -> None:
    assert tokens_of("100M", 512) == (64, 1024)
    assert tokens_of("nano", 64) == (8, 64)
    with pytest.raises(InputError, match="multiples of 16"):
        tokens_of("100M", 100)


def test_results_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    options = ["--size", "tiny", "--pixels", "64", "--repeats", "1", "--tasks", "generate,edit,caption", "--quiet"]
    assert main(["bench", *options, "--out", str(tmp_path), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert {Path(path).name for path in printed["paths"]} == {
        "tiny-64px.json",
        "tiny-64px.md",
        "tiny-64px-scaling.png",
    }
    data = json.loads((tmp_path / "tiny-64px.json").read_text())
    assert {(row["case"], row["way"]) for row in data["rows"]} >= {
        ("edit-4 64px", "ours"),
        ("edit-4 64px", "published"),
        ("caption 64px", "ours"),
    }
    assert all(row["step_flops"] > 0 and row["working_bytes"] > 0 for row in data["rows"])
    names = [row["name"] for row in data["comparisons"]]
    assert any("diffusers / ours" in name for name in names)
    assert {sweep["along"] for sweep in data["scaling"]} == {"tokens", "sources", "batch"}
    page = (tmp_path / "tiny-64px.md").read_text()
    assert data["command"] in page
    assert all(name in page for name in names)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--size", "7B"], "unknown size"),
        (["--tasks", "paint"], "unknown task"),
        (["--parts", "all"], "unknown part"),
        (["--size", "nano", "--parts", "peer"], "proportions"),
        (["--pixels", "100"], "multiples of"),
        (["--repeats", "0"], "at least 1"),
    ],
)
def test_bad_options_are_named(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--size", "tiny", "--pixels", "64", *options, "--quiet"]) == 2
    assert message in capsys.readouterr().err


def test_the_peer_only_generates() -> None:
    with pytest.raises(InputError, match="generates"):
        peer(Case("edit", "tiny", 64, sources=1))
