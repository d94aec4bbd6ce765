"""Records any run of `runtime.fit` in a folder and renders it: figures and one HTML page.

- `create(path)` opens a run folder; `RunFolder.record(segment)` is what a listener of `fit` calls.
- `read(path)` reads a finished run; `figures` draws it.
- `render(run)` writes the page, `write_report(path)` the page of a folder.

It needs numpy only; the figures and the page need matplotlib, which is imported when one is drawn.
"""

from esper_fn.report import figures
from esper_fn.report._folder import Run, RunFolder, create, measure_segment, read
from esper_fn.report._html import render, write_report

__all__ = [
    "Run",
    "RunFolder",
    "create",
    "figures",
    "measure_segment",
    "read",
    "render",
    "write_report",
]
