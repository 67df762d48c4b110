"""CPUID is asked rightly, and oneDNN is limited only where AMX is claimed and not described."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from unialignment import processor

DESCRIBED = (0x0400_2000, 0x0008_0040, 0x10, 0)
"""What a processor with AMX answers to leaf 0x1D, subleaf 1: Intel's manual, volume 1, chapter 18.3."""


@pytest.fixture(autouse=True)
def unlimited(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in processor.VARIABLES:
        monkeypatch.setenv(name, "to be restored afterwards")
        monkeypatch.delenv(name)


def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flags: str, tiles: tuple[int, ...] | None) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: fpu {flags}\nbugs\t\t: none\n")
    monkeypatch.setattr(processor, "_CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(processor, "cpuid", lambda leaf, subleaf: tiles if (leaf, subleaf) == (0x1D, 1) else None)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/cpuinfo")
def test_cpuid_is_the_processors() -> None:
    vendor = processor.cpuid(0)
    if vendor is None:
        pytest.skip("CPUID can't be asked here")
    name = b"".join(vendor[register].to_bytes(4, "little") for register in (1, 3, 2)).decode()
    stated = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("vendor_id")]
    assert stated[0].endswith(name)


@pytest.mark.parametrize(
    ("flags", "tiles", "limit"),
    [
        ("avx512_bf16 amx_tile amx_bf16", (0, 0, 0, 0), "AVX512_CORE_BF16"),
        ("avx512_bf16 avx512_fp16 amx_tile amx_bf16", (0, 0, 0, 0), "AVX512_CORE_FP16"),
        ("avx512_bf16 amx_tile amx_bf16", DESCRIBED, None),
        ("avx512_bf16 amx_tile amx_bf16", None, None),
        ("avx512_bf16", (0, 0, 0, 0), None),
    ],
)
def test_only_undescribed_tiles_are_avoided(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flags: str, tiles: tuple[int, ...] | None, limit: str | None
) -> None:
    machine(monkeypatch, tmp_path, flags, tiles)
    assert processor.limit_instruction_sets() == limit
    assert os.environ.get("ONEDNN_MAX_CPU_ISA") == limit


@pytest.mark.parametrize("name", processor.VARIABLES)
def test_a_limit_of_the_users_own_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    machine(monkeypatch, tmp_path, "amx_tile", (0, 0, 0, 0))
    monkeypatch.setenv(name, "DEFAULT")
    assert processor.limit_instruction_sets() is None
    assert {key: os.environ.get(key) for key in processor.VARIABLES if key in os.environ} == {name: "DEFAULT"}


def test_systems_that_say_nothing_are_left_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(processor, "_CPUINFO", tmp_path / "absent")
    assert processor.flags() == frozenset()
    assert processor.limit_instruction_sets() is None
    monkeypatch.setattr(processor.platform, "machine", lambda: "aarch64")
    assert processor.cpuid(0) is None


def test_bfloat16_computes_after_the_import() -> None:
    """In a process of its own: where AMX is claimed and not described, this one would not return."""
    environment = {key: value for key, value in os.environ.items() if key not in processor.VARIABLES}
    code = "import unialignment, torch; a = torch.ones(64, 64, dtype=torch.bfloat16); print(float((a @ a)[0, 0]))"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "64.0"
