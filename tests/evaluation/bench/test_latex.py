"""The LaTeX tables: as many cells as columns, hostile names escaped, and pdfLaTeX takes them where it is installed."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from unialignment.evaluation import reading, report, world_report
from unialignment.evaluation.metrics import Estimate
from unialignment.evaluation.report import Run, tex
from unialignment.evaluation.results import METRICS, Results
from unialignment.evaluation.world_report import WorldRun

EVIL = r"[1]* 50%_of $x$ & {\y} # ~ ^ \input{z}" + "\n" + r"\end{tabular}"


def tables() -> dict[str, str]:
    """One table of each kind, with names that LaTeX would take amiss."""
    row = {"ic": [5.0, 4.0, 6.0], "pq": [1.0, 0.5, 2.0], "o": None}
    judged = {EVIL: {"groups": {"edit_multi": row, EVIL: row}, "mean": row}}
    summary = {"judges": judged, "run": {"model": {"world": "scenes"}}, "notes": [EVIL], "calibration": {}}
    found = [0.5, 0.25, 0.75, 4]
    estimates = {key: Estimate(0.5, 0.25, 0.75, 4) for key in METRICS}
    results = Results("m", "nano", "held_out", 0, 4, estimates, ceilings={"truth": dict.fromkeys(METRICS, 1.0)})
    run = WorldRun(EVIL, Path("x"), {"benchmark": {"split": "held_out"}, "model": {}}, results)
    return {
        "report": report.latex([Run(EVIL, Path("x"), summary), Run("b", Path("y"), summary)]),
        "reading": reading.latex({"figures": {EVIL: found}, "groups": {EVIL: {"accuracy": found}}}),
        "world": world_report.latex([run, run]),
    }


@pytest.mark.parametrize("name", ["report", "reading", "world"])
def test_every_row_has_as_many_cells_as_there_are_columns(name: str) -> None:
    lines = [line for line in tables()[name].splitlines() if not line.startswith("%")]
    columns = re.fullmatch(r"\\begin\{tabular\}\{([lr]+)\}", lines[0])
    assert columns and lines[-1] == r"\end{tabular}"
    assert [line for line in lines if line in (r"\toprule", r"\bottomrule")] == [r"\toprule", r"\bottomrule"]
    rows = [line for line in lines[1:-1] if not re.fullmatch(r"\\(top|mid|bottom)rule", line)]
    assert len(rows) >= 3
    for line in rows:
        assert line.endswith(r" \\")
        body = line[:-3]
        assert len(re.findall(r"(?<!\\)&", body)) == len(columns.group(1)) - 1
        assert not re.search(r"(?<!\\)[$#_%^~]", body)
        assert body.count("{") == body.count("}") and r"\input" not in body


def test_text_is_escaped_character_by_character() -> None:
    assert tex("a_b") == r"a\_b" and tex("50 %") == r"50 \%" and tex("\\") == r"\textbackslash{}"
    assert tex("a\n\n b") == "a b"


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="pdfLaTeX is not installed")
def test_pdflatex_takes_them(tmp_path: Path) -> None:
    if not subprocess.run(["kpsewhich", "booktabs.sty"], capture_output=True, check=False).stdout:
        pytest.skip("the LaTeX here has no booktabs")
    for name, text in tables().items():
        (tmp_path / f"{name}.tex").write_text(text, encoding="utf-8")
    body = "\n\n".join(rf"\input{{{name}}}" for name in tables())
    packages = r"\usepackage{booktabs}\usepackage[landscape,paperwidth=900mm,paperheight=900mm]{geometry}"
    document = rf"\documentclass{{article}}{packages}\begin{{document}}{body}\end{{document}}"
    (tmp_path / "main.tex").write_text(document)
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "main.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout[-1500:]
    assert (tmp_path / "main.pdf").stat().st_size > 1000
