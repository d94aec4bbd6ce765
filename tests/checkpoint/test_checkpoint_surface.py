"""What users may rely on of checkpoints and of the runtime."""

from __future__ import annotations

from esper_fn import checkpoint, runtime


def test_the_names_of_checkpoint() -> None:
    assert checkpoint.__all__ == [
        "CheckpointWarning", "Damage", "Decision", "Restored", "Retention", "Writer", "best",
        "check", "every", "everything", "latest", "pinned", "prune", "register", "restore",
        "save", "steps", "verify", "within_bytes",
    ]  # fmt: skip
    assert all(getattr(checkpoint, name).__doc__ for name in checkpoint.__all__)


def test_the_names_of_the_runtime() -> None:
    assert runtime.__all__ == [
        "Checkpoints", "Fit", "FitOptions", "Segment", "Steering", "TrainState", "array_batches",
        "compile_fit", "compile_fit_host", "count_compilations", "enlarge", "fit",
        "fit_host", "init", "lifecycle_events", "make_step", "make_survey", "restore_state",
        "save_state", "scan_steps", "stage_counts", "steer", "termination",
    ]  # fmt: skip
    assert all(getattr(runtime, name).__doc__ for name in runtime.__all__)
