"""The web page: every task in the browser, mounted on the server that answers the API and sharing its engine.

:func:`mount` is all that the server calls. Knows nothing of how requests are computed.
"""

from __future__ import annotations

from unialignment.serving.web.environment import UPLOADS
from unialignment.serving.web.page import PATH, build, mount

__all__ = ["PATH", "UPLOADS", "build", "mount"]
