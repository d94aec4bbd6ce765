"""Run folders and the report of a run: figures and one self-contained HTML page.

Needs numpy; the figures and the page need matplotlib, which is imported when one is drawn.
"""

from esper_fn.report import figures
from esper_fn.report._folder import Run, RunFolder, create, read
from esper_fn.report._html import render, write_report

__all__ = ["Run", "RunFolder", "create", "figures", "read", "render", "write_report"]
