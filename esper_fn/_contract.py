"""What the checks of schedules, governors and policies have in common."""

from __future__ import annotations

from typing import Any, NoReturn

import jax

from esper_fn._arguments import describe


class Contract:
    """Raises `ValueError` where a part breaks its contract, naming the part.

    Args:
      subject: the part, as messages call it.
    """

    def __init__(self, subject: str) -> None:
        self._subject = subject

    def fail(self, finding: str) -> NoReturn:
        """Raises with a message."""
        raise ValueError(f"{self._subject}: {finding}")

    def check_state(self, state: Any) -> None:
        """Raises unless the state of `init` is made of JAX arrays."""
        for path, leaf in jax.tree.leaves_with_path(state):
            if not isinstance(leaf, jax.Array):
                name = jax.tree_util.keystr(path) or "(root)"
                self.fail(f"init: the state's leaf {name} must be a JAX array, got {leaf!r}")

    def check_pair(self, call: str, result: Any, second: str) -> None:
        """Raises unless a function returned `(state, second)`."""
        if not isinstance(result, tuple) or len(result) != 2:
            self.fail(f"{call} must return (state, {second}), got {describe(result)}")

    def check_same_form(self, call: str, before: Any, after: Any) -> None:
        """Raises unless two states have the same structure, shapes and dtypes."""
        forms = [_form(state) for state in (before, after)]
        if forms[0] != forms[1]:
            self.fail(f"{call} turns a state {forms[0]} into {forms[1]}")


def _form(state: Any) -> tuple[Any, list[str]]:
    leaves, structure = jax.tree.flatten(state)
    return structure, [f"{leaf.dtype}{list(leaf.shape)}" for leaf in leaves]
