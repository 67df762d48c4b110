"""Compilation is kept only where it pays, and nothing is left compiled where it does not."""

from __future__ import annotations

import time

import pytest
from torch import nn

from unialignment.errors import ConfigError
from unialignment.training.runtime import choose_device, compile_if_faster


class Fake(nn.Module):
    """Pretends that compiling changes its speed."""

    def __init__(self, compiled_seconds: float, fails: bool = False) -> None:
        super().__init__()
        self.compiled_seconds = compiled_seconds
        self.fails = fails

    def compile(self, **_: object) -> None:  # type: ignore[override]
        if self.fails:
            raise RuntimeError("no C++ compiler")
        self._compiled_call_impl = True

    def run(self) -> None:
        time.sleep(self.compiled_seconds if self._compiled_call_impl else 0.01)


@pytest.mark.parametrize(
    ("mode", "seconds", "fails", "kept"),
    [("off", 0.0, False, False), ("auto", 0.001, False, True), ("auto", 0.02, False, False), ("auto", 0.0, True, False),
     ("on", 0.02, False, True)],
)  # fmt: skip
def test_modes(mode: str, seconds: float, fails: bool, kept: bool) -> None:
    module, said = Fake(seconds, fails), []
    assert compile_if_faster(mode, [module], module.run, said.append) is kept
    assert bool(module._compiled_call_impl) is kept
    assert len(said) == (mode != "off")


def test_a_failing_compiler_is_an_error_only_when_it_was_asked_for() -> None:
    module = Fake(0.0, fails=True)
    with pytest.raises(ConfigError, match=r"run\.compile.*no C\+\+ compiler"):
        compile_if_faster("on", [module], module.run, print)


def test_absent_devices_are_refused() -> None:
    assert choose_device("cpu").type == "cpu"
    with pytest.raises(ConfigError, match="not a device"):
        choose_device("gpu")
    with pytest.raises(ConfigError, match="this machine has none"):
        choose_device("mps")
