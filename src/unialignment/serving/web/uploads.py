"""What visitors upload, kept within bounds: on disk the oldest files go first, and sketches in memory likewise.

Gradio limits each file alone and removes files by age. Size and duration of one upload are the guard's to limit. Knows
nothing of tabs.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

log = logging.getLogger(__name__)

MAX_FILES = 4_000
"""Uploaded files kept at once."""
BROKEN_SECONDS = 600.0
"""After so long an unfinished upload has broken off."""
MAX_SKETCHES = 64
"""Sketches that browsers have sent and not used yet."""
MAX_LAYERS = 16
"""Layers of a sketch that are taken; the page shows one."""
MAX_SKETCH = 4 * 2**20
"""Bytes of one of a sketch's pictures; the canvas has 320 × 320 pixels."""


def make_room(folder: Path, known: set[str], most_bytes: int, most_files: int = MAX_FILES) -> int:
    """Remove the oldest uploads until the others keep within both limits; says how many.

    Args:
        folder: Where uploads lie. Files directly in it are uploads that broke off, as finished ones get a folder each.
        known: Paths of finished uploads; removed ones are taken out.
        most_bytes: Bytes of all that is left.
        most_files: Number of all that is left.
    """
    found: list[tuple[float, int, Path]] = []
    removed = total = 0
    for path in [*map(Path, list(known)), *(folder.iterdir() if folder.is_dir() else ())]:
        with contextlib.suppress(OSError):
            if not path.is_file():
                continue
            facts = path.stat()
            if path.parent == folder and time.time() - facts.st_mtime > BROKEN_SECONDS:
                path.unlink()
                removed += 1
            else:
                found.append((facts.st_mtime, facts.st_size, path))
    found.sort(key=lambda item: item[0], reverse=True)
    for number, (_, size, path) in enumerate(found):
        total += size
        if number < most_files and total <= most_bytes:
            continue
        with contextlib.suppress(OSError):
            path.unlink()
            removed += 1
            if path.parent != folder:
                path.parent.rmdir()
        known.discard(str(path))
    if removed:
        log.info("removed %d uploads that broke off or were the oldest", removed)
    return removed


class UploadRoom:
    """ASGI middleware: makes room before a file is uploaded, and after.

    Args:
        app: The application.
        path: The route that takes files.
        room: Makes room.
    """

    def __init__(self, app: ASGIApp, path: str, room: Callable[[], Any]) -> None:
        self.app, self.path, self.room = app, path, room

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http" or scope["path"].rstrip("/") != self.path:
            await self.app(scope, receive, send)
            return
        await asyncio.to_thread(self.room)
        await self.app(scope, receive, send)
        await asyncio.to_thread(self.room)


def bounded_sketches(canvas: Any) -> None:
    """Bound what a canvas keeps of sketches that browsers send ahead of using them.

    Gradio keeps them for ever if they aren't used, and makes a list as long as a layer's number says.
    """
    store, accept = canvas.blob_storage, canvas.accept_blobs

    def accept_blobs(data: Any) -> None:
        files: list[tuple[str, bytes]] = getattr(data, "files", [])
        facts = getattr(data, "data", None)
        if len(files) != 1 or len(files[0][1]) > MAX_SKETCH:
            raise HTTPException(400, f"expected one picture of at most {MAX_SKETCH} bytes")
        if not isinstance(facts, dict) or not {"type", "id", "index"} <= facts.keys():
            raise HTTPException(400, "expected the picture's type, id and index")
        if str(facts["index"] or "null") not in ("null", *map(str, range(MAX_LAYERS))):
            raise HTTPException(400, f"expected at most {MAX_LAYERS} layers")
        accept(data)
        while len(store) > MAX_SKETCHES:
            store.pop(next(iter(store)), None)

    accept_blobs._is_server_fn = True  # type: ignore[attr-defined]  # what gradio asks for before it calls one
    canvas.accept_blobs = accept_blobs
