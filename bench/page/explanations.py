"""Why fastopt is slower somewhere, shown beside the row."""

from __future__ import annotations

EXPLANATIONS: dict[str, str] = {}
"""Text by ``"<case>: <contender>"``, ``"<family>: <contender>"``, ``"<case>"`` or ``"<family>"``.

The first of these that is found is shown.
"""
