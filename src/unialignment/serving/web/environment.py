"""What gradio reads from the environment when it is imported; imported before it."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # no request leaves this machine
_parent = os.environ.get("GRADIO_TEMP_DIR") or None
if _parent:
    Path(_parent).mkdir(parents=True, exist_ok=True)
# Gradio's is one for all servers of a machine: the first to stop takes the others' files, and room is made in it.
_folder = tempfile.TemporaryDirectory(prefix="unialign-uploads-", dir=_parent)
os.environ["GRADIO_TEMP_DIR"] = _folder.name
UPLOADS = Path(_folder.name)
"""Where uploaded files lie: a folder of this process's own, below the one that the environment names, if any."""
