"""What JAX must know of the seeds in scope, so that no compiled call uses those of another scope.

A function that is compiled, scanned or rematerialised may read the seeds in scope when it is
traced. JAX keeps the trace, and would use it again where other seeds are in scope. So each `Seeds`
has a mark, and the mark in scope is part of the key under which JAX keeps a trace.
"""

from __future__ import annotations

import jax


class Mark:
    """Equal to itself alone; holds no array, since JAX keeps it as long as the trace."""


# Made where the core is imported: a context made later would make all that is compiled unknown.
marked = jax.make_user_context(None)
"""`with marked(mark):` traces and compiles for this mark alone."""
