"""``python -m unialignment.demo``: the main job once, from prompt to page.

Draws pictures from prompts, describes one, answers questions about it, edits it, segments it, estimates its depth, and
composes two, all with one model; writes a contact sheet and a self-contained page. Does none of it itself.
"""

from __future__ import annotations

import argparse
import base64
import html
import io
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from unialignment.errors import StorageError
from unialignment.evaluation.sheet import Panel, Row, contact_sheet, enlarged

T = TypeVar("T")

PROMPTS = (
    "a large flat car in the center, on a yellow background",
    "a large shaded dog on the left, on a blue background",
    "a shaded cactus on the left and a flat pizza on the right, on a white background",
    "a flat rocket at the top, on a purple background",
    "a large shaded apple on the right, on a teal background",
    "a shaded cat at the bottom left and a flat bus at the top right, on an orange background",
)
MAIN = 0
"""The picture that the later steps look at."""
SUBJECT = "car"
QUESTIONS = ("what is in the picture?", "what color is the background?", f"is there a {SUBJECT}?")
INSTRUCTION = "make the background green"
COMPOSITION = "put the subject of image 1 to the left of the subject of image 2"
COMPOSED = (0, 4)


@dataclass
class Report:
    """What the demo did: rows to show, and how long each step took in seconds."""

    rows: list[Row] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    def timed(self, step: str, work: Callable[[], T]) -> T:
        """Run one step, note its time and print it."""
        start = time.perf_counter()
        result = work()
        self.seconds[step] = round(time.perf_counter() - start, 2)
        print(f"{step:<28}{self.seconds[step]:7.2f} s", file=sys.stderr)
        return result


def run(pipe: Any, seed: int, report: Report) -> None:
    """Do everything with a loaded pipeline and collect it in ``report``."""
    quiet = {"progress": False}
    drawn = report.timed(
        f"generate {len(PROMPTS)} pictures",
        lambda: pipe.generate(list(PROMPTS), seed=[seed + i for i in range(len(PROMPTS))], **quiet).images,
    )
    picture = drawn[MAIN]
    captions = report.timed("caption", lambda: pipe.caption(drawn, **quiet).texts)
    panels = (
        Panel(image, "", f"prompt: {prompt}\ncaption: {text}")
        for image, prompt, text in zip(drawn, PROMPTS, captions, strict=True)
    )
    report.rows.append(Row("generate, then caption", tuple(panels), "captions are written without knowing the prompt"))
    answers = report.timed(
        "answer", lambda: pipe.answer([picture] * len(QUESTIONS), list(QUESTIONS), seed=seed, **quiet).texts
    )
    edited = report.timed("edit", lambda: pipe.edit(INSTRUCTION, picture, seed=seed, **quiet).images[0])
    mask = report.timed(
        "segment", lambda: pipe.perceive(picture, "segment", of=f"the {SUBJECT}", seed=seed, **quiet).images[0]
    )
    depth = report.timed("depth", lambda: pipe.perceive(picture, "depth", seed=seed, **quiet).images[0])
    edges = report.timed("edges", lambda: pipe.perceive(picture, "edges", seed=seed, **quiet).images[0])
    report.rows.append(
        Row(
            "edit, segment, depth, edges",
            (
                Panel(picture, "source"),
                Panel(edited, "edit", INSTRUCTION),
                Panel(mask, "segment", f"segment the {SUBJECT}"),
                Panel(depth, "depth", "near is bright"),
                Panel(edges, "edges", "outlines of objects"),
                Panel(None, "answer", "\n".join(f"{q} {a}" for q, a in zip(QUESTIONS, answers, strict=True))),
            ),
            "all from the first picture",
        )
    )
    pair = [drawn[index] for index in COMPOSED]
    composed = report.timed("compose", lambda: pipe.compose(COMPOSITION, [pair], seed=seed, **quiet).images[0])
    report.rows.append(
        Row(
            "compose",
            (Panel(pair[0], "image 1"), Panel(pair[1], "image 2"), Panel(composed, "result", COMPOSITION)),
            "a new picture from two",
        )
    )


def _data_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


_STYLE = """
:root { color-scheme: light dark; --paper: #f4f1ea; --card: #fff; --ink: #22262e; --soft: #6c7280; --accent: #3b5bdb; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #16181d; --card: #20242c; --ink: #eceff4; --soft: #9aa3b2; --accent: #8ea2ff; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 3rem 1.25rem 4rem; }
h1 { font-size: 2.2rem; margin: 0; letter-spacing: -.02em; }
h2 { margin: 2.6rem 0 .9rem; font-size: 1.15rem; color: var(--accent); }
h2 small { color: var(--soft); font-weight: 400; margin-left: .6rem; }
p { max-width: 46rem; color: var(--soft); }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(160px, 1fr)); gap: 14px; }
figure { margin: 0; background: var(--card); border-radius: 12px; overflow: hidden; box-shadow: 0 1px 4px #0002; }
figure img { width: 100%; aspect-ratio: 1; object-fit: cover; display: block; }
figcaption { padding: .6rem .75rem .75rem; font-size: .84rem; color: var(--soft); }
figcaption b { color: var(--ink); display: block; }
table { border-collapse: collapse; font-size: .9rem; }
td { padding: .2rem 1.6rem .2rem 0; }
td + td { text-align: right; }
"""


def _figure(panel: Panel, title: str) -> str:
    label = html.escape(panel.label)
    picture = ""
    if panel.image is not None:
        picture = f'<img alt="{label or html.escape(title)}" src="{_data_uri(enlarged(panel.image, 256))}">'
    heading = f"<b>{label}</b>" if label else ""
    text = "<br>".join(html.escape(panel.text).splitlines())
    return f"<figure>{picture}<figcaption>{heading}{text}</figcaption></figure>"


def page(report: Report, title: str, note: str) -> str:
    """The self-contained HTML page."""
    sections = []
    for row in report.rows:
        figures = "".join(_figure(panel, row.title) for panel in row.panels)
        heading = f"{html.escape(row.title)}<small>{html.escape(row.note)}</small>"
        sections.append(f'<h2>{heading}</h2><div class="grid">{figures}</div>')
    times = "".join(
        f"<tr><td>{html.escape(step)}</td><td>{seconds:.2f} s</td></tr>" for step, seconds in report.seconds.items()
    )
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style><main><h1>{html.escape(title)}</h1>"
        f"<p>{html.escape(note)}</p>{''.join(sections)}<h2>time</h2><table>{times}</table></main></html>\n"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse arguments, run, write ``contact-sheet.png`` and ``index.html``, and print where they are.

    Raises:
        StorageError: the results can't be written.
    """
    parser = argparse.ArgumentParser(
        prog="unialign demo",
        description="Run every task once with one model and write a page with the results.",
        epilog="example: unialign demo --out out/demo",
    )
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder to write to (default: out/demo)")
    parser.add_argument("--model", default="nano", help="bundled name, folder or hub id (default: nano)")
    parser.add_argument("--seed", type=int, default=0, help="seed of all samplers (default: 0)")
    parser.add_argument("--json", action="store_true", help="print paths and times as JSON")
    args = parser.parse_args(arguments)
    report = Report()
    start = time.perf_counter()

    def load() -> Any:
        import unialignment

        return unialignment.load(args.model)

    pipe = report.timed("load the model", load)
    run(pipe, args.seed, report)
    title = f"UniAlignment: one model ({args.model})"
    note = (
        "Every picture and text below comes from one diffusion transformer, none was chosen, and none was touched up. "
        f"Made by: python -m unialignment.demo --model {args.model} --seed {args.seed}"
    )
    sheet, site = args.out / "contact-sheet.png", args.out / "index.html"

    def write() -> None:
        try:
            args.out.mkdir(parents=True, exist_ok=True)
            contact_sheet(report.rows, title, f"seed {args.seed}, nothing chosen", side=176).save(sheet, optimize=True)
            site.write_text(page(report, title, note), encoding="utf-8")
        except OSError as error:
            raise StorageError(f"could not write to {args.out}: {error}; choose another folder with --out") from error

    report.timed("write sheet and page", write)
    total = round(time.perf_counter() - start, 2)
    if args.json:
        found = {"contact_sheet": str(sheet), "page": str(site), "seconds": report.seconds, "total_seconds": total}
        print(json.dumps(found, indent=2))
    else:
        print(f"contact sheet: {sheet}\npage:          {site}\ntotal:         {total:.1f} s")
    return 0


if __name__ == "__main__":
    from unialignment.errors import UniAlignmentError

    try:
        sys.exit(main())
    except UniAlignmentError as error:
        sys.exit(f"unialign demo: error: {error}")
