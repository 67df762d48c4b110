"""Keeps PyTorch's CPU kernels to instructions that work where a virtual machine describes its processor incompletely.

Some hypervisors pass on Intel's matrix extension (AMX), and say so, but leave CPUID's description of its tiles (leaf
0x1D) empty. oneDNN, PyTorch's library for products in bfloat16, sizes its tiles by that leaf, and the process ends with
"Illegal instruction" at the first such product. Knows nothing of PyTorch, and is imported before it.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import sys
from pathlib import Path

VARIABLES = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
"""oneDNN's own limit of instruction sets, read with its first product; whoever sets one is left alone."""
_CPUINFO = Path("/proc/cpuinfo")
_TILES = 0x1D
_CODE = bytes.fromhex("53 4989d0 89f8 89f1 0fa2 418900 41895804 41894808 4189500c 5b c3")
"""``void f(uint32 leaf, uint32 subleaf, uint32 out[4])``: CPUID, by the calling convention of Unix on x86-64."""


def cpuid(leaf: int, subleaf: int = 0) -> tuple[int, int, int, int] | None:
    """EAX, EBX, ECX, EDX of the processor's CPUID; ``None`` where it can't be asked (other systems, hardened ones)."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return None
    try:
        page = mmap.mmap(-1, len(_CODE), prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    except (OSError, ValueError):
        return None
    page.write(_CODE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(page))
    out = (ctypes.c_uint32 * 4)()
    ctypes.CFUNCTYPE(None, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_void_p)(start)(
        leaf, subleaf, ctypes.addressof(out)
    )
    return out[0], out[1], out[2], out[3]


def flags() -> frozenset[str]:
    """Instruction sets of the first processor, as Linux names them; none on other systems."""
    try:
        with _CPUINFO.open(encoding="ascii", errors="replace") as file:
            for line in file:
                if line.startswith("flags"):
                    return frozenset(line.partition(":")[2].split())
    except OSError:
        pass
    return frozenset()


def limit_instruction_sets() -> str | None:
    """Keep oneDNN off AMX where its tiles aren't described; returns the limit that was set, if any.

    Called when the package is imported, before any product. bfloat16 is slower then than AMX would be, but computes.
    """
    if any(name in os.environ for name in VARIABLES):
        return None
    known = flags()
    if "amx_tile" not in known:
        return None
    tiles = cpuid(_TILES, 1)
    if tiles is None or any(tiles):
        return None
    limit = "AVX512_CORE_FP16" if "avx512_fp16" in known else "AVX512_CORE_BF16"
    os.environ[VARIABLES[0]] = limit
    return limit
