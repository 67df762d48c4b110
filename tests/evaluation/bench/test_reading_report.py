"""The page of benchmarks of texts and maps: figures of the records, worst and best items, runs side by side."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from unialignment.cli import main
from unialignment.errors import InputError
from unialignment.evaluation import page, reading, reading_report
from unialignment.evaluation.reading import Question, ReadingBenchmark, Rows, mean_of

EVIL = "</pre><script>alert('x')</script>"
COUNT = 20


def benchmark(root: Path, fingerprint: str = "f", kind: str = "") -> ReadingBenchmark:
    """Questions whose right answers are their numbers; in two groups."""
    root.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (30, 20), "blue").save(root / "p.png")
    items = tuple(
        Question(f"q{n}", "even" if n % 2 == 0 else "odd", root / "p.png", (f"{n} {EVIL}",), {"answer": n}, kind)
        for n in range(COUNT)
    )

    def score(items: Any, answers: Any) -> Rows:
        if kind:
            return np.array([[np.asarray(one).mean() / 255] for one in answers])
        return np.array([[float(one[0].split()[0]) / COUNT] for one in answers])

    return ReadingBenchmark("Bench", items, fingerprint, "", score, {"closeness": mean_of(0)}, (EVIL,))


class Teller:
    def __init__(self, less: int = 0) -> None:
        self.less = less

    def identity(self) -> dict[str, Any]:
        return {"kind": EVIL, "less": self.less}

    def tell(self, picture: Image.Image, question: str, hint: str, seed: int) -> str:
        number = int(question.split()[0])
        if number == 3:
            raise InputError("not this one")
        return f"{max(0, number - self.less)} {EVIL}"

    def chart(self, picture: Image.Image, kind: str, seed: int) -> Image.Image:
        return Image.new("L", (8, 8), 128)


def text_of(page_: str) -> str:
    return html.unescape(re.sub(r"<[^>]*>", " ", page_.split("<main>")[1].split("</main>")[0]))


def test_the_page_shows_figures_items_and_other_runs(tmp_path: Path) -> None:
    bench = benchmark(tmp_path / "data")
    for name, less in (("a", 0), ("b", 2)):
        reading.answer(tmp_path / name, bench, Teller(less))
    summary = reading.summarise(tmp_path / "a", bench)
    written = reading_report.write_html(tmp_path / "a", [tmp_path / "b"], bench).read_text()
    shown = text_of(written)
    for group in (summary["figures"], *summary["groups"].values()):
        value, low, high, count = group["closeness"]
        assert f"{value:.4g}" in shown and f"{low:.4g} – {high:.4g}" in shown and f" {count} " in shown
    assert written.count("<rect") == 2 * 3  # two runs; all, even and odd
    ids = re.findall(r'data-id="(q\d+)"', written)
    assert {"q0", "q1", "q18", "q19"} <= set(ids) and "q3" not in ids  # of 19 answered ones, 6 of each end and group
    assert len(ids) == len(set(ids)) and "1 of 20 items failed" in shown
    scores = dict(re.findall(r'data-score="([\d.]+)" data-id="(q\d+)"', written))
    assert {name: float(score) for score, name in scores.items()}["q19"] == pytest.approx((19 + 17) / 2 / COUNT)
    assert "accepted" in shown and "a: 0.95" in shown and "b: 0.85" in shown


def test_hostile_answers_stay_text_and_no_network_is_asked(tmp_path: Path) -> None:
    bench = benchmark(tmp_path / "data")
    reading.answer(tmp_path / "a", bench, Teller(), limit=3)
    written = reading_report.write_html(tmp_path / "a", [], bench, 3).read_text()
    assert written.count("<script") == written.count("</script>") == 1
    assert EVIL in text_of(written) and "default-src 'none'" in written
    assert not re.search(r'(?:src|href)="(?!data:)', written)


def test_maps_are_shown_as_pictures(tmp_path: Path) -> None:
    bench = benchmark(tmp_path / "data", kind="depth")
    reading.answer(tmp_path / "a", bench, Teller(), limit=2)
    written = reading_report.write_html(tmp_path / "a", [], bench, 2).read_text()
    assert written.count("<img") == 2 * 4 and "accepted" not in written


def test_runs_of_something_else_do_not_stand_beside_it(tmp_path: Path) -> None:
    bench = benchmark(tmp_path / "data")
    reading.answer(tmp_path / "a", bench, Teller(), limit=1)
    reading.answer(tmp_path / "b", benchmark(tmp_path / "data", "other"), Teller(), limit=1)
    with pytest.raises(InputError, match="another benchmark"):
        reading_report.write_html(tmp_path / "a", [tmp_path / "b"], bench, 1)
    with pytest.raises(InputError, match="missing or damaged"):
        reading_report.write_html(tmp_path / "a", [tmp_path / "none"], bench, 1)


def test_the_command_writes_the_page(tmp_path: Path, repo_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "val2014").mkdir()
    Image.new("RGB", (16, 12), "red").save(tmp_path / "val2014" / "1.jpg")
    rows = [{"question_id": n, "image": "1.jpg", "text": "is it?", "label": "yes" if n else "no"} for n in range(2)]
    (tmp_path / "coco_pope_random.json").write_text("\n".join(map(json.dumps, rows)))
    shared = [
        "eval",
        "pope",
        str(tmp_path),
        "--model",
        f"python:{repo_root / 'examples/evaluation/my_model.py'}:MyModel",
    ]
    assert main([*shared, "--out", str(tmp_path / "one")]) == 0
    assert main([*shared, "--out", str(tmp_path / "two"), "--compare", str(tmp_path / "one")]) == 0
    assert str(tmp_path / "two" / "report.html") in capsys.readouterr().out
    written = (tmp_path / "two" / "report.html").read_text()
    assert "one, all: 0.50" in written and "two, all: 0.50" in written
    assert main([*shared, "--out", str(tmp_path / "two"), "--compare", str(tmp_path / "two")]) == 2
    assert "runs other than --out" in capsys.readouterr().err


def test_extremes_are_the_worst_and_the_best() -> None:
    scores = {f"i{n}": float(n) for n in range(30)}
    assert page.extremes([*scores, "unknown"], scores) == [f"i{n}" for n in (*range(6), *range(24, 30))]
