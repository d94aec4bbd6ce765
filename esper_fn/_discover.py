"""Finding the sites of a model by running it in the abstract."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from esper_fn._lattice import Site
from esper_fn.errors import LatticeError


class Discovery:
    """Stands in for `Seeds` while the sites of a model are looked for."""

    def __init__(self) -> None:
        self.sites: dict[str, Site] = {}

    def declare(self, site: Site) -> None:
        """Notes a site; the same one may be reached several times."""
        known = self.sites.setdefault(site.name, site)
        if known != site:
            raise LatticeError(
                f"site {site.name!r} is declared twice, as {known} and as {site}; "
                "give the two places different names"
            )


def discover(run: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Site, ...]:
    """The sites that `linen.Grow` and `nnx.Grow` modules declare, in the order of their calls.

    Args:
      run: calls the model once, e.g. `lambda x: model(x)`; nothing is computed.
      *args: its arguments, arrays or `jax.ShapeDtypeStruct`s.
      **kwargs: its keyword arguments.

    Raises:
      LatticeError: no site, or two different ones of the same name.
    """
    from esper_fn._ambient import using

    found = Discovery()

    def traced(*args: Any, **kwargs: Any) -> Any:
        with using(found):
            return run(*args, **kwargs)

    jax.eval_shape(traced, *args, **kwargs)
    if not found.sites:
        raise LatticeError(
            "the model has no site; put `linen.Grow(...)` or `nnx.Grow(...)` after a layer"
        )
    return tuple(found.sites.values())
