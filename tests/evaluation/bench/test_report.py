"""The page asks nothing of any network, shows hostile text as text, and says what the records say."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from unialignment.errors import InputError
from unialignment.evaluation import harness
from unialignment.evaluation.benchmarks import Benchmark, Item
from unialignment.evaluation.judges import Answer
from unialignment.evaluation.judges.prompts import PromptSet
from unialignment.evaluation.radar import MARGIN, SIDE, radar
from unialignment.evaluation.report import OUTSIDE, Run, latex, read_runs, write_html
from unialignment.evaluation.scoring import PROTOCOLS

EVIL = """</script><script src="https://evil.example/x.js"></script><img src=//evil.example onerror='alert(1)'>"&"""
COUNT = 20


class Page(HTMLParser):
    """Everything that a browser would see as markup."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]


class Painter:
    def __init__(self, world: str) -> None:
        self.world = world

    def identity(self) -> dict[str, Any]:
        return {"kind": EVIL, "world": self.world}

    def draw(self, item: Item, seed: int) -> tuple[Image.Image, dict[str, Any]]:
        if item.id == "edit/3":
            raise InputError(EVIL)
        return Image.new("RGB", (300, 200), (seed, 0, 0)), {"shortened": True, "read": [EVIL]}


class Critic:
    """Scores are the item's number, and the answer is hostile."""

    name, in_flight = "critic", 1

    def identity(self) -> dict[str, Any]:
        return {"kind": EVIL}

    def ask(self, prompt: str, images: Any, attempt: int) -> Answer:
        red = int(np.asarray(images[-1])[0, 0, 0])
        return Answer(f'{EVIL} {{"score": [{red / 2:.1f}]}}')


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory: pytest.TempPathFactory) -> Benchmark:
    photo = tmp_path_factory.mktemp("photos") / 'a"><script>.png'
    Image.new("RGB", (40, 30), "blue").save(photo)
    items = tuple(
        Item(f"{kind}/{n}", kind, kind, EVIL, (EVIL,), photo, n) for kind in ("generate", "edit") for n in range(COUNT)
    )
    return Benchmark(f"Bench {EVIL}", ("generate", "edit"), items, "f")


def finish(folder: Path, benchmark: Benchmark, world: str = "scenes", protocol: str = "corrected") -> Path:
    critic = Critic()
    harness.generate(folder, benchmark, Painter(world))
    harness.judge(folder, benchmark, critic, PromptSet(), PROTOCOLS[protocol])
    summary = harness.summarise(folder, benchmark, ["critic"])
    summary["run"] = json.loads((folder / "run.json").read_text())
    summary["identities"] = {"critic": json.loads((folder / "judges" / "critic" / "judge.json").read_text())}
    summary["calibration"] = {"critic": {"verdict": EVIL}}
    harness.save_summary(folder, summary)
    return folder


@pytest.fixture(scope="module")
def runs(benchmark: Benchmark, tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    root = tmp_path_factory.mktemp("runs")
    return read_runs([finish(root / "a_1" / "run", benchmark), finish(root / "b" / "run", benchmark, "open")])


@pytest.fixture(scope="module")
def text(runs: list[Run], benchmark: Benchmark, tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_html(tmp_path_factory.mktemp("report") / "report.html", runs, benchmark).read_text()


def test_nothing_is_asked_of_a_network(text: str) -> None:
    page = Page(text)
    assert not {tag for tag, _ in page.tags} & {"link", "iframe", "object", "embed", "base", "form", "video", "audio"}
    for _, attributes in page.tags:
        for name in ("src", "href", "srcset", "action", "data", "poster", "xlink:href"):
            assert attributes.get(name, "data:").startswith("data:")
        assert "url(" not in attributes.get("style", "")
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL)
    script = re.search(r"<script>(.*?)</script>", text, re.DOTALL)
    assert style and script
    assert not re.search(r"url\(|@import|//", style.group(1))
    assert not re.search(r"fetch|XMLHttp|import\b|//", script.group(1))
    assert "default-src 'none'" in page.all("meta")[1]["content"]
    assert len(page.all("img")) > 20


def test_hostile_text_stays_text(text: str) -> None:
    page = Page(text)
    assert len(page.all("script")) == 1 and page.all("script")[0] == {}
    assert not [attributes for _, attributes in page.tags if any(name.startswith("on") for name in attributes)]
    assert text.count("</script>") == 1
    assert page.text.count(EVIL) > 50  # prompts, answers, errors, verdicts and names are all shown as they are


def test_figures_are_those_of_the_records(text: str, runs: list[Run]) -> None:
    page = Page(text)
    for run in runs:
        for key in ("ic", "pq", "o"):
            value, low, high = run.summary["judges"]["critic"]["groups"]["generate"][key]
            assert f"{value:.2f}" in page.text and f"[{low:.2f}, {high:.2f}]" in page.text
    assert runs[0].summary["judges"]["critic"]["groups"]["generate"]["o"][0] == pytest.approx((COUNT - 1) / 4, abs=0.01)
    assert len([one for one in page.all("rect") if "fill" in one]) == 2 * 2
    heights = [float(one["height"]) for one in page.all("rect")]
    assert heights[0] == pytest.approx(220 * (COUNT - 1) / 40, abs=0.1)


def test_the_gallery_holds_the_worst_the_best_and_the_failed(text: str) -> None:
    cards = Page(text).all("article")
    ids = {card["data-id"] for card in cards}
    assert {f"generate/{n}" for n in (0, 1, 5, 14, 18, 19)} <= ids and "generate/10" not in ids
    assert "edit/3" in ids
    scores = {card["data-id"]: float(card["data-score"]) for card in cards}
    assert scores["generate/19"] == pytest.approx(9.5) and scores["edit/3"] == -1


def test_what_the_reader_has_to_know_first(text: str, runs: list[Run]) -> None:
    assert Page(text).text.count(OUTSIDE) == 1  # of two runs, one model knows emoji scenes alone
    assert OUTSIDE in latex(runs) and "shortened" in Page(text).text


def test_runs_of_one_name_are_told_apart(runs: list[Run]) -> None:
    assert [run.label for run in runs] == ["run", "run (2)"]


def test_latex_is_escaped(runs: list[Run]) -> None:
    odd = Run("[1]* 50%_of $x$ & {\\y}\n\\input{z}", runs[0].folder, runs[0].summary)
    table = latex([odd])
    assert r"{[}1]{*} 50\%\_of \$x\$ \& \{\textbackslash{}y\} \textbackslash{}input\{z\} & critic & " in table
    body = [line for line in table.splitlines() if not line.startswith(("%", "\\"))]
    assert len(body) == 4 and all(line.endswith(r"\\") for line in body[1:])
    assert len(re.findall(r"(?<!\\)&", body[1])) == 5


def test_different_runs_do_not_stand_side_by_side(runs: list[Run], benchmark: Benchmark, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no results"):
        read_runs([runs[0].folder, tmp_path])
    small = Benchmark(benchmark.name, benchmark.groups, benchmark.items, "other")
    with pytest.raises(InputError, match="different benchmarks"):
        read_runs([runs[0].folder, finish(tmp_path / "c", small)])
    with pytest.raises(InputError, match="different protocols"):
        read_runs([runs[0].folder, finish(tmp_path / "d", benchmark, protocol="published")])


def test_the_radar_puts_values_where_they_belong() -> None:
    groups = ["up", "right", "down", "left"]
    chart = radar([("m", "#123456", {"up": 10, "right": 5, "down": 0, "left": 20})], groups, 10, "O")
    centre, reach = SIDE / 2 + MARGIN, SIDE / 2
    at = [(float(x), float(y)) for x, y in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', chart)]
    expected = [(centre, centre - reach), (centre + reach / 2, centre), (centre, centre), (centre - reach, centre)]
    assert at == [pytest.approx(point, abs=0.1) for point in expected]  # what is above the best stays on the rim
    assert chart.count('stroke="#123456"') == 1
    partial = radar([("m", "#123456", {"up": 10})], groups, 10, "O")
    assert 'stroke="#123456"' not in partial and partial.count("<circle") == 1
    assert radar([], groups[:2], 10, "O") == ""
    assert "<script>" not in radar([("<script>", "#123456", {"up": 1})], ["<script>", "up", "c"], 10, "<script>")
