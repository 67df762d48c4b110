"""Benchmarks over files by the names that the command line knows them by. Knows nothing of running them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from unialignment.evaluation.benchmarks import Benchmark, captions, checked, edits, mmbench, nyu, vqa
from unialignment.evaluation.reading import ReadingBenchmark

DRAWING: dict[str, Callable[[Path], Benchmark]] = {
    "geneval": checked.load_geneval,
    "dpg-bench": checked.load_dpg,
    "gedit-bench": edits.load_gedit,
    "imgedit": edits.load_imgedit,
}
"""Benchmarks whose pictures a judge looks at, besides SemGen-Bench."""

READING: dict[str, Callable[[Path], ReadingBenchmark]] = {
    "coco-captions": captions.load,
    "vqav2": vqa.load_vqav2,
    "gqa": vqa.load_gqa,
    "pope": vqa.load_pope,
    "mmbench": mmbench.load,
    "nyuv2": nyu.load,
}
"""Benchmarks that ask for texts or maps; no judge takes part."""
