"""Experiment trackers beside ``metrics.jsonl``: Weights & Biases and trackio, which share one interface.

Imported only when a configuration names them. Knows nothing of what is trained.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

from unialignment.errors import ConfigError
from unialignment.storage import write_text

PACKAGES = {"wandb": "wandb", "trackio": "trackio"}
"""Package to import and install, by the tracker's name in a configuration."""

PROJECT = "unialignment"


class Tracker:
    """One open run of a tracker.

    Args:
        module: ``wandb`` or ``trackio``.
        run: What its ``init`` returned.
    """

    def __init__(self, module: Any, run: Any) -> None:
        self._module = module
        self._run = run

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Record numbers of one step."""
        self._run.log(values, step=step)

    def image(self, step: int, name: str, path: Path) -> None:
        """Record a picture file."""
        self._run.log({name: self._module.Image(str(path))}, step=step)

    def close(self) -> None:
        """Send what is left."""
        self._run.finish()


def open_tracker(name: str, folder: Path, run: str, settings: dict[str, Any]) -> Tracker:
    """Begin a tracker's run, or go on with the one that an earlier start of this run began.

    Args:
        name: ``wandb`` or ``trackio``.
        folder: The run's folder; the tracker's identifier for the run is kept there.
        run: Name to show.
        settings: The run's configuration.

    Raises:
        ConfigError: the tracker isn't installed, or refuses to begin.
    """
    try:
        module = importlib.import_module(PACKAGES[name])
    except ImportError as error:
        raise ConfigError(
            f"logging.trackers names {name}, which is not installed: pip install {PACKAGES[name]}, or leave it out."
        ) from error
    path = folder / f"{name}.json"
    try:
        known = json.loads(path.read_text())["run"]
    except (OSError, ValueError, KeyError):
        known = None
    options: dict[str, Any] = {"project": PROJECT, "name": known if name == "trackio" and known else run}
    options["config"] = settings
    options["resume"] = "allow"
    if name == "wandb":
        options["dir"] = str(folder)
        if known:
            options["id"] = known
    try:
        opened = module.init(**options)
    except Exception as error:
        raise ConfigError(f"{name} could not begin a run: {' '.join(str(error).split())}.") from error
    identifier = getattr(opened, "id", None) if name == "wandb" else getattr(opened, "name", run)
    write_text(path, json.dumps({"run": identifier or run}) + "\n")
    return Tracker(module, opened)
