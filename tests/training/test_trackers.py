"""Trackers: imported when named, resumed by identifier, missing ones said clearly."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from unialignment.errors import ConfigError
from unialignment.training.logging import RunLog


class Fake(ModuleType):
    """What wandb and trackio have in common."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.began: list[dict] = []
        self.logged: list[tuple[dict, int]] = []
        self.finished = 0

    def init(self, **options: object) -> SimpleNamespace:
        self.began.append(options)
        return SimpleNamespace(
            id="abc",
            name=options["name"],
            log=lambda values, step: self.logged.append((values, step)),
            finish=self._end,
        )

    def _end(self) -> None:
        self.finished += 1

    @staticmethod
    def Image(path: str) -> tuple[str, str]:
        return ("image", path)


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_numbers_and_pictures_arrive_and_a_resumed_run_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    module = Fake(name)
    monkeypatch.setitem(sys.modules, name, module)
    log = RunLog(tmp_path, tensorboard=False, trackers=(name,), name="mine", settings={"run": {"seed": 3}})
    log.scalars(4, {"loss/total": 0.5, "bad": float("nan")}, "train/")
    log.image(4, "edit", np.zeros((4, 4, 3), np.uint8))
    log.close()
    assert module.began[0]["name"] == "mine" and module.began[0]["config"] == {"run": {"seed": 3}}
    assert module.logged[0] == ({"train/loss/total": 0.5}, 4)
    assert module.logged[1][0]["samples/edit"][1].endswith("edit-0000004.png") and module.finished == 1
    RunLog(tmp_path, tensorboard=False, resume_step=4, trackers=(name,), name="mine").close()
    again = module.began[1]
    assert again["resume"] == "allow" and again.get("id") == ("abc" if name == "wandb" else None)
    assert json.loads((tmp_path / f"{name}.json").read_text())["run"] == ("abc" if name == "wandb" else "mine")


def test_a_missing_tracker_is_named_with_its_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"pip install wandb"):
        RunLog(tmp_path, tensorboard=False, trackers=("wandb",))
