"""A program that saves without end, to be killed: `python saving.py FOLDER SEED`.

Goes on from the newest sound step, which must hold what its number says. Says `ready STEP` once it
has restored and `acknowledged STEP` for each step that is on the disk.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from esper_fn import checkpoint

STEPS_KEPT = 3


def state(step: int) -> dict[str, Any]:
    """What the state of a step is, and nothing else: 1.5 MB that changes, 2 MB that does not."""
    changing = np.random.default_rng(step).integers(0, 2**31, size=(200, 1000))
    return {
        "host": np.random.default_rng(0).normal(size=(1 << 18,)),
        "changing": changing.astype(np.int32),
        "step": step,
    }


def holds(value: Any, step: int) -> bool:
    expected = state(step)
    return value["step"] == step and all(
        np.array_equal(value[name], expected[name]) for name in ("host", "changing")
    )


def main(folder: str) -> int:
    with checkpoint.Writer(folder, keep=checkpoint.latest(STEPS_KEPT)) as writer:
        step = 0
        if checkpoint.steps(folder):
            restored = writer.restore()
            step = restored.step
            if restored.passed_over or not holds(restored.value, step):
                print("unsound", restored.passed_over, flush=True)
                return 1
        print("ready", step, flush=True)
        while True:
            step += 1
            writer.save(step, state(step), parts=("host",))
            writer.wait()
            print("acknowledged", step, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
