"""The report of a run: one page that needs no network, pictures for the README, and a table for it."""

from __future__ import annotations

from .page import write_page, write_pictures
from .summary import readme_block

__all__ = ["readme_block", "write_page", "write_pictures"]
