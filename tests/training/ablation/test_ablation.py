"""Ablations: every run is known before the first starts, none is repeated, failures are told, reports need no runs."""

from __future__ import annotations

import json
import stat
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from unialignment.cli import main
from unialignment.errors import ConfigError, InputError, StorageError, UniAlignmentError
from unialignment.evaluation.records import run_lock
from unialignment.training.ablation import driver, report, worker
from unialignment.training.ablation.config import AblationConfig, load_ablation, plan
from unialignment.training.config import known_keys

TRAIN = {
    "run": {"threads": 1},
    "model": {"flavour": "tiny"},
    "mixture": {"generate": 2, "caption": 2},
    "loss": {"cross": 0.0, "intrinsic": 0.0},
    "data": {"workers": 0},
    "logging": {"tensorboard": False, "log_every": 1, "validation_steps": 1, "validation_samples": 2, "samples": False},
}  # fmt: skip


@pytest.fixture()
def write(tmp_path: Path):
    """Writes an ablation of two arms, with changes."""

    def make(**changes) -> Path:
        data = {
            "name": "small",
            "dir": str(tmp_path / "runs"),
            "report": str(tmp_path / "report"),
            "seeds": [0, 1],
            "compute": {"steps": 2},
            "train": TRAIN,
            "arms": {
                "none": {"title": "nothing"},
                "cross": {"title": "pairs", "baseline": "none", "train": {"loss": {"cross": 0.05}}},
            },
            "measure": {"limit": 1, "tasks": ["caption"], "pool": 3},
            "metrics": ["validation.generate", "retrieval.r1"],
            **changes,
        }
        path = tmp_path / "ablation.yaml"
        path.write_text(yaml.safe_dump(data, sort_keys=False))
        return path

    return make


def record(config: AblationConfig, arm: str, seed: int, value: float) -> dict:
    run = next(run for run in plan(config) if (run.arm, run.seed) == (arm, seed))
    reading = {"form": "condition", "pool": 3, "as_trained": {"clean": 1.0}, "blind": 0.33,
               "swapped_pass": {"clean": 0.0}, "swapped_own": {"clean": 1.0}, "separate": 1.0}  # fmt: skip
    return {
        "arm": arm,
        "seed": seed,
        "fingerprint": worker.fingerprint(run, config.measure),
        "trained": {"steps": 2, "seconds": 1.0, "cpu_seconds": 1.0, "samples": 8, "parameters": 10},
        "metrics": {"validation.generate": value, "retrieval.r1": 0.5},
        "intervals": {},
        "leak": {"train": reading, "held_out": reading} if arm == "cross" else None,
        "curves": {"validation/task/generate": [[1, 2.0], [2, value]]},
    }


def store(config: AblationConfig, entry: dict) -> None:
    folder = config.dir / f"{entry['arm']}-{entry['seed']}"
    folder.mkdir(parents=True)
    (folder / "record.json").write_text(json.dumps(entry))


def test_runs_differ_in_their_arm_and_seed_only(write) -> None:
    runs = list(plan(load_ablation(write())))
    assert [run.name for run in runs] == ["none-0", "cross-0", "none-1", "cross-1"]
    first, second = (run.config.model_dump(mode="json") for run in runs[:2])
    changed = {key for key in first if first[key] != second[key]}
    assert changed == {"run", "loss"} and second["loss"]["cross"] == 0.05
    assert first["run"]["max_steps"] == 2 and first["run"]["seed"] == 0
    assert runs[0].config.text.tokenizer == runs[3].config.text.tokenizer  # one for all
    assert runs[0].config.teacher.cache == runs[1].config.teacher.cache != runs[2].config.teacher.cache


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"compute": {}}, "compute.steps or compute.seconds"),
        ({"compute": {"steps": 1, "seconds": 1}}, "one of them"),
        ({"seeds": [1, 1]}, "once"),
        ({"train": {**TRAIN, "run": {"seed": 3}}}, "train.run.seed is set for each run"),
        ({"train": {**TRAIN, "optimiser": {}}}, "did you mean 'optimizer'"),
        ({"arms": {"a": {"title": "a", "baseline": "b"}}}, "no other arm is called 'b'"),
        ({"arms": {"a/b": {"title": "a"}}}, "names a folder"),
        ({"arms": {"a": {"title": "a", "train": {"teacher": {"cache": "x"}}}}}, "arms.a.train.teacher.cache"),
    ],
)
def test_mistakes_are_found_before_anything_runs(write, changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_ablation(write(**changes))


def test_the_shipped_ablation_is_valid_and_its_keys_are_documented(repo_root: Path) -> None:
    config = load_ablation(repo_root / "configs/ablation.yaml")
    assert len(config.seeds) >= 3
    text = (repo_root / "docs/reference.md").read_text()
    keys = [key for key in known_keys(AblationConfig) if key not in ("kind", "compute", "measure")]
    keys += ["arms.<name>.title", "arms.<name>.baseline", "arms.<name>.train"]
    assert [key for key in keys if f"| `{key}` |" not in text] == []


def test_the_leak_is_measured_on_forms_that_differ(repo_root: Path) -> None:
    runs = {run.arm: run.config for run in plan(load_ablation(repo_root / "configs/leak.yaml", ["seeds=[0]"]))}
    forms = {arm: (c.model.transformer.get("attention_mode", "prefix"), c.loss.cross_form) for arm, c in runs.items()}
    assert forms == {
        "conditions": ("prefix", "condition"),
        "published": ("joint", "published"),
        "prefix-published": ("prefix", "published"),
    }


def test_the_published_arm_is_as_published(repo_root: Path) -> None:
    runs = {run.arm: run.config for run in plan(load_ablation(repo_root / "configs/ablation.yaml", ["seeds=[0]"]))}
    published, both = runs["published"], runs["both"]
    assert published.model.transformer["attention_mode"] == "joint"
    assert (published.loss.cross_form, published.loss.published_projector) == ("published", True)
    assert (published.loss.cross, published.loss.intrinsic) == (both.loss.cross, both.loss.intrinsic) == (0.05, 0.1)
    # Every arm sees the same scenes: those of the teacher's pool.
    assert len({(c.teacher.name, c.teacher.pool, str(c.mixture)) for c in runs.values()}) == 1


def test_a_run_is_trained_once_and_measured_once(write, tokenizer_folder: Path, pack, monkeypatch) -> None:
    train = {**TRAIN, "text": {"tokenizer": str(tokenizer_folder)}}
    path = write(train=train, seeds=[0], arms={"cross": {"title": "pairs", "train": {"loss": {"cross": 0.05}}}})
    config = load_ablation(path)
    said: list[str] = []
    assert driver.run_all(config, said.append, in_process=True)
    folder = config.dir / "cross-0"
    first = json.loads((folder / "record.json").read_text())
    assert first["trained"]["steps"] == 2 and first["trained"]["cpu_seconds"] > 0
    assert {"caption.objects", "retrieval.r1", "validation.generate", "gap.generate.0.99"} <= set(first["metrics"])
    assert [step for step, _ in first["curves"]["validation/retrieval/r1"]] == [1, 2]
    assert first["leak"]["train"]["form"] == "condition"

    monkeypatch.setattr(worker.CurveTrainer, "train", lambda self: pytest.fail("trained twice"))
    assert driver.run_all(config, said.append, in_process=True)
    assert "1 of 1 runs finished" in said[-1]
    # Other measurements: measured again, but not trained again.
    again = load_ablation(path, ["measure.pool=2"])
    assert report.collect(again) == ([], 1)
    assert driver.run_all(again, said.append, in_process=True)
    second = json.loads((folder / "record.json").read_text())
    assert second["trained"] == first["trained"] and second["leak"]["train"]["pool"] == 2
    # Other training: the folder belongs to something else.
    with pytest.raises(ConfigError, match="other settings"):
        driver.run_all(load_ablation(path, ["train.optimizer.lr=1"]), said.append, in_process=True)


def test_a_stopped_run_goes_on(write, tokenizer_folder: Path, pack, monkeypatch) -> None:
    path = write(
        train={**TRAIN, "text": {"tokenizer": str(tokenizer_folder)}}, seeds=[0], arms={"none": {"title": "-"}}
    )
    config = load_ablation(path)
    real = worker.CurveTrainer.step

    def stop_after_the_first(self, micros):
        logs = real(self, micros)
        import os
        import signal

        os.kill(os.getpid(), signal.SIGTERM)
        return logs

    monkeypatch.setattr(worker.CurveTrainer, "step", stop_after_the_first)
    assert driver.run_all(config, in_process=True) is False
    assert not (config.dir / "none-0/record.json").exists()
    monkeypatch.setattr(worker.CurveTrainer, "step", real)
    assert driver.run_all(config, in_process=True)
    done = json.loads((config.dir / "none-0/record.json").read_text())
    assert [step for step, _ in done["curves"]["validation/task/generate"]] == [1, 2]


@pytest.fixture()
def pretend(tmp_path: Path, monkeypatch):
    """Replaces the worker by a shell script; the driver sees its exit codes alone."""

    def use(script: str) -> None:
        program = tmp_path / "worker.sh"
        program.write_text(f"#!/bin/sh\n# -m module config arm seed\n{script}\n")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setattr(sys, "executable", str(program))
        monkeypatch.setattr(driver, "prepare", lambda *_: None)

    return use


def test_runs_are_processes_and_their_failures_are_told(write, pretend) -> None:
    config = load_ablation(write(jobs=2))
    said: list[str] = []
    pretend("exit 0")
    assert driver.run_all(config, said.append)
    assert sum("finished after" in line for line in said) == 4
    pretend('echo "no luck with $4" && exit 2')
    with pytest.raises(UniAlignmentError, match=r"none-0 \(exit code 2\): no luck with none"):
        driver.run_all(config, said.append)


def test_a_stopped_process_stops_the_ablation(write, pretend) -> None:
    pretend(f"exit {worker.STOPPED}")
    said: list[str] = []
    assert driver.run_all(load_ablation(write()), said.append) is False
    assert "stopped and saved" in said[-1]


def test_an_unknown_measurement_is_found_before_anything_runs(write) -> None:
    with pytest.raises(ConfigError, match=r"unknown captoin; expected some of caption"):
        driver.run_all(load_ablation(write(measure={"tasks": ["captoin"]})))


def test_two_drivers_do_not_meet(write) -> None:
    config = load_ablation(write())
    with run_lock(config.dir), pytest.raises(StorageError, match="in use"):
        driver.run_all(config)


def test_the_report_compares_seed_by_seed(write, tmp_path: Path) -> None:
    config = load_ablation(write())
    for arm, seed, value in (("none", 0, 1.0), ("none", 1, 2.0), ("cross", 0, 0.5), ("cross", 1, 1.25)):
        store(config, record(config, arm, seed, value))
    records, planned = report.collect(config)
    assert (len(records), planned) == (4, 4)
    summary = report.summarise(config, records)
    first = summary["comparisons"][0]
    assert (first["arm"], first["metric"], first["difference"]["mean"]) == ("cross", "validation.generate", -0.625)
    assert first["p_exact"] == 0.5 and first["p_t_holm"] == first["p_t"]  # the other row has no spread, hence no t
    text = report.markdown(config, records, summary, planned)
    assert "| cross | none | `validation.generate` | 2 | -0.625 |" in text
    assert "1.500 ± 0.707" in text and "leak" in text


def test_a_report_of_what_there_is_and_from_raw_records_alone(write, tmp_path: Path, capsys) -> None:
    path = write()
    config = load_ablation(path)
    with pytest.raises(InputError, match="no run"):
        report.write_report(config, [], 4, config.report)
    store(config, record(config, "none", 0, 1.0))
    assert main(["ablate", str(path), "--report-only", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["finished"] == 1
    assert (config.report / "figure.png").read_bytes().startswith(b"\x89PNG")
    table = (config.report / "table.md").read_text()
    (config.dir / "none-0/record.json").unlink()
    assert main(["ablate", str(path), "--report-only"]) == 0
    assert (config.report / "table.md").read_text() == table
    assert main(["ablate", str(path), "--list"]) == 0
    assert "none-0: not started" in capsys.readouterr().out


def test_damaged_records_are_named(write, tmp_path: Path) -> None:
    config = load_ablation(write())
    store(config, record(config, "none", 0, 1.0))
    (config.dir / "none-0/record.json").write_text("{")
    with pytest.raises(ConfigError, match=r"record\.json is damaged"):
        report.collect(config)
    (tmp_path / "records.jsonl").write_text("{\n")
    with pytest.raises(InputError, match="damaged"):
        report.read_records(tmp_path / "records.jsonl")


def test_without_matplotlib_the_remedy_is_named(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    with pytest.raises(UniAlignmentError, match="pip install"):
        report.draw_figure({"arms": {}, "panels": [], "comparisons": [], "title": ""}, tmp_path / "figure.png")


def test_curves_are_thinned_and_each_step_occurs_once(tmp_path: Path) -> None:
    lines = [{"step": step, "train/loss/total": 1.0, "ignored": 2} for step in range(1, 301)]
    lines += [{"step": 300, "validation/task/caption": 1.0}, {"step": 300, "validation/task/caption": 0.5}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = worker.curves(tmp_path / "metrics.jsonl")
    assert len(found["train/loss/total"]) == 60 and found["validation/task/caption"] == [[300, 0.5]]
    assert set(found) == {"train/loss/total", "validation/task/caption"}


def test_worker_explains_mistakes(write, capsys, monkeypatch) -> None:
    monkeypatch.setattr(worker, "execute", lambda *_: None)
    config = load_ablation(write())
    path = config.dir / "ablation.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert worker.main([str(path), "none", "0"]) == worker.STOPPED
    monkeypatch.setattr(worker, "execute", lambda *_: SimpleNamespace())
    assert worker.main([str(path), "none", "0"]) == 0
    path.write_text("kind: ablation\n")
    assert worker.main([str(path), "none", "0"]) == 2
    assert "compute" in capsys.readouterr().err


def test_records_outlive_new_settings_but_not_changed_ones(write) -> None:
    path = write()
    marks = [
        worker.fingerprint(next(plan(config)), config.measure)
        for config in (
            load_ablation(path),
            load_ablation(path, ["train.prompt_dropout=0.1", "measure.leak=true"]),  # defaults, said aloud
            load_ablation(path, ["train.run.threads=1", f"dir={path.parent / 'elsewhere'}"]),
            load_ablation(path, ["train.prompt_dropout=0.2", "measure.leak=false"]),
        )
    ]
    assert marks[0] == marks[1] == marks[2]
    assert marks[0]["train"] != marks[3]["train"] and marks[0]["measure"] != marks[3]["measure"]
