"""A run that was stopped and went on is the run that was never stopped."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
from checkpoint_support import assert_same, fail, files_of, flip, step_folder
from growing import Job, digest, main_job, mlp, transformer

import esper_fn as ef
from esper_fn import checkpoint, runtime
from esper_fn.checkpoint._files import num_disk_bytes
from esper_fn.errors import NoCheckpointError, ResumeError
from esper_fn.lifecycle import Stage

STEPS = 120


@pytest.fixture(scope="module")
def whole(job: Job) -> runtime.Fit:
    return job.fit(num_steps=STEPS)


def stages_at(fit: runtime.Fit, step: int) -> set[str]:
    """Stages of seeds once `step` steps are done, dormant ones left out."""
    last = {event["seed"]: event["to"] for event in fit.events if event["step"] < step}
    return set(last.values()) - {"DORMANT"}


def stopped_at(job: Job, folder: Path, step: int, **options: Any) -> runtime.Fit:
    """The run, stopped after `step` steps and gone on with from what was saved."""
    done = 0

    def count(segment: runtime.Segment) -> None:
        nonlocal done
        done = segment.first_step + segment.num_steps

    with checkpoint.Writer(folder, on_failure=fail) as writer:
        saving = runtime.Checkpoints(writer=writer, every_steps=10**9)
        first = job.fit(
            checkpoints=saving, should_stop=lambda: done >= step, listener=count, **options
        )
    assert first.num_steps == step
    with checkpoint.Writer(folder, on_failure=fail) as writer:
        saving = runtime.Checkpoints(writer=writer, every_steps=10**9)
        second = job.fit(checkpoints=saving, **options)
    assert second.resumed_from == step
    return second


def assert_same_run(first: runtime.Fit, second: runtime.Fit) -> None:
    np.testing.assert_array_equal(first.losses, second.losses)
    assert first.events == second.events
    assert_same(first.state, second.state)
    for name in ("num_rollbacks", "num_parameters", "adapter_flops", "num_passes", "survey_flops"):
        assert getattr(first, name) == getattr(second, name), name
    assert first.rollbacks == second.rollbacks


def test_the_run_has_something_to_lose(whole: runtime.Fit) -> None:
    seen = set().union(*(stages_at(whole, step) for step in range(0, STEPS, 5)))
    assert seen >= {"TRAINING", "GRAFTING", "FINE_TUNING", "FOSSILIZED"}


@pytest.mark.parametrize("stage", ["TRAINING", "GRAFTING", "FINE_TUNING", "FOSSILIZED"])
def test_stopped_in_a_stage_and_gone_on_with(
    job: Job, whole: runtime.Fit, tmp_path: Path, stage: str
) -> None:
    step = next(step for step in range(5, STEPS, 5) if stage in stages_at(whole, step))
    assert_same_run(whole, stopped_at(job, tmp_path, step, num_steps=STEPS))


def test_saving_changes_nothing_and_compiles_nothing(
    job: Job, whole: runtime.Fit, tmp_path: Path
) -> None:
    with checkpoint.Writer(tmp_path, on_failure=fail) as writer:
        saving = runtime.Checkpoints(writer=writer, every_steps=10)
        assert_same_run(whole, done := job.fit(num_steps=STEPS, checkpoints=saving))
        assert done.num_compiled == 0
        assert writer.num_saved == 12
        again = job.fit(num_steps=STEPS, checkpoints=saving)  # finished already
    assert again.resumed_from == STEPS
    assert_same_run(whole, again)


def test_a_finished_run_may_be_made_longer(job: Job, whole: runtime.Fit, tmp_path: Path) -> None:
    with checkpoint.Writer(tmp_path, on_failure=fail) as writer:
        saving = runtime.Checkpoints(writer=writer)
        job.fit(num_steps=60, checkpoints=saving)
        assert_same_run(whole, job.fit(num_steps=STEPS, checkpoints=saving))


def test_a_damaged_step_is_passed_over_and_said(
    job: Job, whole: runtime.Fit, tmp_path: Path
) -> None:
    with checkpoint.Writer(tmp_path, on_failure=fail) as writer:
        job.fit(num_steps=80, checkpoints=runtime.Checkpoints(writer=writer, every_steps=20))
    flip(files_of(step_folder(tmp_path, 80))[-1], 40)
    with checkpoint.Writer(tmp_path, on_failure=fail) as writer:
        with pytest.warns(checkpoint.CheckpointWarning, match="going on from step 60.*step 80"):
            done = job.fit(
                num_steps=STEPS, checkpoints=runtime.Checkpoints(writer=writer, every_steps=20)
            )
        assert done.resumed_from == 60
        assert_same_run(whole, done)
    assert set(checkpoint.verify(tmp_path).values()) == {None}
    for step in checkpoint.steps(tmp_path):
        flip(files_of(step_folder(tmp_path, step))[-1], 40)
    with (
        checkpoint.Writer(tmp_path, on_failure=fail) as writer,
        pytest.raises(NoCheckpointError, match="nothing to restore: step 120"),
    ):
        job.fit(num_steps=STEPS, checkpoints=runtime.Checkpoints(writer=writer))


def test_commands_taken_after_the_last_save_are_taken_again(job: Job, tmp_path: Path) -> None:
    """The process ends between taking a command and saving what it did."""
    seed = job.growth.layout.seed_index("layer2.0", 0)

    def commands(step: int) -> list[Any]:
        return {30: [ef.commands.germinate(seed, "bottleneck")]}.get(step, [])

    whole = job.fit(num_steps=60, commands=commands)
    assert "command" in [e["cause"] for e in whole.events if e["step"] == 30]

    class EndedError(Exception):
        pass

    def ends(segment: runtime.Segment) -> None:
        if segment.first_step == 35:
            assert any(event["cause"] == "command" for event in taken)
            raise EndedError
        taken.extend(segment.events)

    taken: list[Any] = []
    with checkpoint.Writer(tmp_path, on_failure=fail) as writer:
        saving = runtime.Checkpoints(writer=writer, every_steps=20)
        with pytest.raises(EndedError):
            job.fit(num_steps=60, commands=commands, checkpoints=saving, listener=ends)
        again = job.fit(num_steps=60, commands=commands, checkpoints=saving)
    assert again.resumed_from == 20
    assert_same_run(whole, again)


def test_a_note_comes_back_and_saved_numbers_win(job: Job, tmp_path: Path) -> None:
    heard: list[Any] = []
    with checkpoint.Writer(tmp_path, on_failure=fail) as writer:
        saving = runtime.Checkpoints(
            writer=writer, note=lambda: {"x": [1, float("nan"), None]}, recall=heard.append
        )
        job.fit(num_steps=20, checkpoints=saving)
        assert heard == []
        start = job.growth.init(jax.random.key(9))
        done = job.fit(num_steps=20, checkpoints=saving, start=start)
    assert str(heard) == "[{'x': [1, nan, None]}]"
    assert int(done.state.growth_state.step) == 20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"segment_steps": 4}, "segment_steps is 4 now and was 5"),
        ({"survey_every": 10, "program": None}, "survey_every is 10 now and was 5"),
        ({"snapshot_every": None}, "snapshot_every is None now and was 50"),
        ({"num_snapshots": 4}, "num_snapshots is 4 now and was 3"),
        ({"max_commands": 5}, "max_commands is 5 now and was 4"),
        ({"num_steps": 10}, "step 20 lies beyond num_steps=10"),
    ],
)
def test_other_settings_are_refused_by_name(
    job: Job, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with checkpoint.Writer(tmp_path, on_failure=fail) as writer:
        saving = runtime.Checkpoints(writer=writer)
        job.fit(num_steps=20, checkpoints=saving)
        with pytest.raises(ResumeError, match=message):
            job.fit(**{"num_steps": 40, "checkpoints": saving, **options})
        with pytest.raises(ResumeError, match="of an earlier run"):
            job.fit(num_steps=20, checkpoints=runtime.Checkpoints(writer=writer, resume=False))


def test_another_layout_host_or_optimizer_is_refused_by_name(job: Job, tmp_path: Path) -> None:
    with checkpoint.Writer(tmp_path, on_failure=fail) as writer:
        saving = runtime.Checkpoints(writer=writer)
        job.fit(num_steps=10, checkpoints=saving)
        with pytest.raises(ResumeError, match="capacity is 1 now and was 2"):
            mlp(capacity=1).fit(num_steps=20, checkpoints=saving)
        other = job._replace(optimizer=ef.optim.per_adapter(optax.sgd(0.1)), program=None)
        with pytest.raises(ResumeError, match=r"opt_state.*exists only in the checkpoint"):
            other.fit(num_steps=20, checkpoints=saving)
        wider = job._replace(params=jax.tree.map(lambda x: np.repeat(x, 2, 0), job.params))
        with pytest.raises(
            ResumeError, match=r"\['bias'\] is float32\[16\] now and float32\[8\] in"
        ):
            wider.fit(num_steps=20, checkpoints=saving)


def test_the_host_alone_goes_on_too(tmp_path: Path, job: Job) -> None:
    def fit(**options: Any) -> runtime.Fit:
        return runtime.fit_host(
            job.loss_fn, optax.adam(1e-2), job.params, job.batches, segment_steps=5, **options
        )

    done = fit(num_steps=40)
    with checkpoint.Writer(tmp_path, on_failure=fail) as writer:
        saving = runtime.Checkpoints(writer=writer)
        fit(num_steps=40, checkpoints=saving, should_stop=lambda: True)
        assert checkpoint.steps(tmp_path) == [5]
        assert_same_run(done, again := fit(num_steps=40, checkpoints=saving))
    assert again.resumed_from == 5


def test_a_failing_disk_does_not_end_training_and_is_told_within_one_interval(
    job: Job, whole: runtime.Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from esper_fn.checkpoint import _orbax

    errors: list[BaseException] = []
    when: list[int] = []
    write, calls = _orbax.write, 0

    def sometimes(folder: Path, arrays: Any) -> None:
        nonlocal calls
        calls += 1
        if calls in (3, 4):
            raise OSError(28, "No space left on device")
        write(folder, arrays)

    monkeypatch.setattr(_orbax, "write", sometimes)

    def listen(segment: runtime.Segment) -> None:
        when.append(len(errors))

    with checkpoint.Writer(tmp_path, on_failure=errors.append) as writer:
        saving = runtime.Checkpoints(writer=writer, every_steps=20)
        done = job.fit(num_steps=STEPS, checkpoints=saving, listener=listen)
    assert_same_run(whole, done)
    assert len(errors) == 2
    # Saved after 60 steps and failed; known when the next step is saved, after 80.
    assert when[80 // 5] == 1
    assert checkpoint.steps(tmp_path)[-1] == STEPS


def broken_at(job: Job, *steps: int) -> Job:
    """The job with inputs that are not numbers in these steps."""

    def batches(first: int, count: int) -> Any:
        inputs, targets = job.batches(first, count)
        hit = np.isin(np.arange(first, first + count), steps)[:, None, None]
        return np.where(hit, np.float32(np.nan), inputs), targets

    return job._replace(batches=batches)


def test_rollbacks_are_reported_with_what_they_restored(job: Job, tmp_path: Path) -> None:
    broken = broken_at(job, 79)
    states: dict[int, Any] = {}

    def listen(segment: runtime.Segment) -> None:
        states[segment.first_step + segment.num_steps] = jax.device_get(segment.state.params)

    done = broken.fit(num_steps=80, snapshot_every=25, listener=listen)
    assert len(done.rollbacks) == done.num_rollbacks == 1
    report = done.rollbacks[0]
    assert (report["step"], report["alarm"], report["loss"]) == (79, "NON_FINITE_LOSS", None)
    assert report["restored_step"] == 50
    assert report["steps_undone"] == 30
    assert_same(jax.tree.map(np.asarray, states[50]), jax.tree.map(np.asarray, states[80]))
    out = [event for event in done.events if event["step"] == 79 and event["to"] == "ROLLED_BACK"]
    assert out
    assert [row["seed"] for row in report["quarantined"]] == [event["seed"] for event in out]
    assert [row["stage"] for row in report["quarantined"]] == [event["from"] for event in out]
    assert_same_run(
        broken.fit(num_steps=80, snapshot_every=25),
        stopped_at(broken, tmp_path, 65, num_steps=80, snapshot_every=25),
    )


def test_emergencies_soon_after_one_another_go_back_further_also_when_stopped_between(
    job: Job, tmp_path: Path
) -> None:
    broken = broken_at(job, 79, 84, 92)
    states: dict[int, Any] = {}

    def listen(segment: runtime.Segment) -> None:
        states[segment.first_step + segment.num_steps] = jax.device_get(segment.state.params)

    whole = broken.fit(num_steps=110, snapshot_every=25, listener=listen)
    assert [(row["step"], row["restored_step"]) for row in whole.rollbacks] == [
        (79, 50), (84, 25), (92, 25),
    ]  # fmt: skip
    assert_same(jax.tree.map(np.asarray, states[50]), jax.tree.map(np.asarray, states[80]))
    assert_same(jax.tree.map(np.asarray, states[25]), jax.tree.map(np.asarray, states[85]))
    for step in (80, 85, 95):
        again = stopped_at(broken, tmp_path / str(step), step, num_steps=110, snapshot_every=25)
        assert_same_run(whole, again)


def test_a_snapshot_that_was_not_renewed_is_not_written_again(job: Job, tmp_path: Path) -> None:
    """On disk each stands alone, and has one copy however many steps hold it."""
    drawn = jax.random.normal(jax.random.key(0), (2, 400_000))
    grown = job.growth.init(jax.random.key(1))
    state = runtime.init(job.optimizer, {"w": drawn[0]}, grown)
    ring = state.ring
    assert ring is not None
    renewed = ring.snapshots.params["w"].at[1].set(drawn[1])
    snapshots = ring.snapshots._replace(params={"w": renewed})
    later = state._replace(params={"w": drawn[1]}, ring=ring._replace(snapshots=snapshots))
    sizes = [0.0]
    with checkpoint.Writer(tmp_path, keep=checkpoint.everything(), on_failure=fail) as writer:
        for step, value in enumerate((state, later, later)):
            runtime.save_state(writer, step, value)
            assert writer.wait()
            sizes.append(num_disk_bytes(tmp_path) / drawn[0].nbytes)
    # Parameters and two moments, once for state and ring; one renewed snapshot; nothing.
    np.testing.assert_allclose(np.diff(sizes), [3, 1, 0], atol=0.3)
    assert_same(later, jax.tree.map(jax.numpy.asarray, runtime.restore_state(tmp_path).value))


def test_a_restored_state_may_start_a_run(job: Job, tmp_path: Path) -> None:
    with checkpoint.Writer(tmp_path, on_failure=fail) as writer:
        first = job.fit(num_steps=60, checkpoints=runtime.Checkpoints(writer=writer))
    state = checkpoint.restore(tmp_path).value["state"]
    done = job.fit(num_steps=5, start=state)
    assert int(done.state.growth_state.step) == int(state.growth_state.step) + 5
    with checkpoint.Writer(tmp_path) as writer:
        for source in (tmp_path, writer):
            read = runtime.restore_state(source, 60, like=first.state)
            assert_same(jax.tree.map(jax.numpy.asarray, read.value), first.state)


# --- other processes ---------------------------------------------------------------------------


def start(folder: Path, *arguments: object) -> subprocess.Popen[str]:
    """The run as a program."""
    return subprocess.Popen(
        [
            sys.executable,
            str(Path(__file__).parent / "growing.py"),
            str(folder),
            *map(str, arguments),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )


def wait_for(process: subprocess.Popen[str], is_it: Callable[[str], bool]) -> None:
    assert process.stdout is not None
    assert any(is_it(line) for line in process.stdout), "the program ended early"


def test_sigterm_saves_at_the_segments_end_and_exits_with_0_and_a_fresh_process_goes_on(
    job: Job, tmp_path: Path
) -> None:
    process = start(tmp_path / "run", 60, 1000, 0.2)
    wait_for(process, lambda line: line == "segment 20\n")
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    step = checkpoint.steps(tmp_path / "run")[-1]
    assert f"resumed None done {step} saved {step}" in said
    assert 25 <= step < 60
    after, _ = start(tmp_path / "run", 60, 1000, 0).communicate(timeout=60)
    assert f"resumed {step} done 60 saved 60" in after
    never_stopped = job.fit(num_steps=60)
    expected = digest((never_stopped.state, never_stopped.losses))
    assert f"digest {expected} {never_stopped.events}" in after


# --- long ones ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("make", [main_job, mlp, transformer])
def test_300_steps_stopped_at_20_random_points(make: Callable[[], Job], tmp_path: Path) -> None:
    job = make()
    whole = job.fit(num_steps=300, segment_steps=3)
    grafting = next(s for s in range(3, 300, 3) if "GRAFTING" in stages_at(whole, s))
    others = [step for step in range(3, 300, 3) if step != grafting]
    points = np.random.default_rng(0).choice(others, 19, replace=False).tolist()
    for step in (grafting, *points):
        again = stopped_at(job, tmp_path / str(step), step, num_steps=300, segment_steps=3)
        assert_same_run(whole, again)
    assert Stage.FOSSILIZED in np.asarray(whole.state.growth_state.seeds.stage)
