"""A saved run in a larger layout, on other devices, or only a part of it."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
from checkpoint_support import assert_same, fail
from growing import Job, mlp

import esper_fn as ef
from esper_fn import checkpoint, runtime
from esper_fn.demo import hosts
from esper_fn.errors import CheckpointError
from esper_fn.lifecycle import Stage

KEY = jax.random.key(7)


@pytest.fixture(scope="module")
def restored(job: Job, tmp_path_factory: pytest.TempPathFactory) -> checkpoint.Restored:
    folder = tmp_path_factory.mktemp("enlarge") / "run"
    with checkpoint.Writer(folder, on_failure=fail) as writer:
        job.fit(num_steps=50, checkpoints=runtime.Checkpoints(writer=writer))
    step = checkpoint.restore(folder)
    assert (step.value["state"].growth_state.owner >= 0).sum() >= 2
    return step


def numbers(tree: Any) -> Any:
    return jax.tree.map(
        lambda leaf: (
            leaf if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key) else np.asarray(leaf)
        ),
        tree,
    )


def larger(job: Job, *, spans: int = 2, chunks: int = 2) -> ef.Growth:
    """A site in front of the old ones, one behind, more room, one blueprint and schedule more."""
    host = hosts.mlp((6, 8, 2, 4), spans=spans, chunks=chunks)
    return ef.Growth(
        sites=[ef.site("first", features=6, chunks=3), *host.sites],
        blueprints={
            "scale": ef.blueprints.scale_shift(),
            "bottleneck": job.growth.layout.blueprints[0],
        },
        capacity=5,
        policy=job.growth.policy,
        graft=[ef.grafting.momentum(), ef.grafting.linear(12)],
        settings=job.growth.settings,
        adapters_at_once=None,
    )


def test_into_the_same_layout_nothing_changes_but_the_ring(
    job: Job, restored: checkpoint.Restored
) -> None:
    enlarged = runtime.enlarge(restored, job.growth, job.optimizer, key=KEY)
    old = restored.value["state"]
    assert enlarged.changes == ("ring: snapshots begin now",)
    for name in ("params", "opt_state", "growth_state"):
        assert_same(numbers(getattr(old, name)), numbers(getattr(enlarged.state, name)))
    oldest = jax.tree.map(lambda leaf: leaf[0], enlarged.state.ring.snapshots.params)
    assert_same(numbers(oldest), numbers(old.params))


def test_every_seed_and_adapter_is_where_it_was(job: Job, restored: checkpoint.Restored) -> None:
    growth = larger(job)
    state, changes = runtime.enlarge(restored, growth, job.optimizer, key=KEY)
    before, after = job.growth, growth
    old = restored.value["state"]
    was = {}
    for index in range(before.layout.num_seeds):
        seed = before.seed(jax.tree.map(jax.numpy.asarray, old.growth_state), index)
        was[seed.site, seed.layer, seed.chunk] = seed
    live = 0
    for index in range(after.layout.num_seeds):
        seed = after.seed(state.growth_state, index)
        twin = was.pop((seed.site, seed.layer, seed.chunk), None)
        if twin is None:
            assert (seed.stage, seed.slot, seed.steps_in_stage) == (Stage.DORMANT, None, 0)
            continue
        for name in ("stage", "parent", "alpha", "blueprint", "graft", "utility", "contribution"):
            assert getattr(seed, name) == getattr(twin, name), name
        if seed.slot is None:
            continue
        live += 1
        assert int(state.growth_state.owner[seed.slot]) == index
        assert_same(
            adapter(after, numbers(state.growth_state.adapters), seed),
            adapter(before, old.growth_state.adapters, twin),
        )
        assert_same(
            adapter(after, numbers(state.opt_state.adapters), seed),
            adapter(before, old.opt_state.adapters, twin),
        )
    assert not was
    assert (
        live
        == (old.growth_state.owner >= 0).sum()
        == (np.asarray(state.growth_state.owner) >= 0).sum()
    )
    assert "growth.seeds: 5 new, dormant" in changes
    assert any("new slots, fresh" in change for change in changes)


def adapter(growth: ef.Growth, banks: Any, seed: ef.lifecycle.Seed) -> Any:
    tables = growth.layout.tables
    bank = next(
        bank
        for bank in tables.banks
        if growth.layout.sites[bank.site].name == seed.site
        and growth.layout.names[bank.blueprint] == seed.blueprint
    )
    assert seed.slot is not None
    assert seed.blueprint is not None
    row = seed.slot - bank.start
    assert 0 <= row < bank.num_slots
    return jax.tree.map(lambda leaf: leaf[row], banks[seed.site][seed.blueprint])


def test_the_loss_is_the_same_and_training_goes_on(job: Job, restored: checkpoint.Restored) -> None:
    growth = larger(job, spans=1)
    state, _ = runtime.enlarge(restored, growth, job.optimizer, key=KEY)

    def loss_fn(params: Any, seeds: Any, batch: Any) -> jax.Array:
        inputs = seeds.grow("first", batch[0])
        return job.loss_fn(params, seeds, (inputs, batch[1]))

    old = jax.tree.map(jax.numpy.asarray, restored.value["state"])
    batch = jax.tree.map(lambda leaf: leaf[0], job.batches(50, 1))
    before = jax.jit(job.loss_fn)(old.params, job.growth.seeds(old.growth_state), batch)
    after = jax.jit(loss_fn)(state.params, growth.seeds(state.growth_state), batch)
    np.testing.assert_allclose(before, after, rtol=1e-6)
    done = runtime.fit(
        growth, loss_fn, job.optimizer, job.params, job.batches,
        num_steps=10, key=KEY, start=state, survey_batch=batch,
        options=runtime.FitOptions(survey_every=None, segment_steps=5),
    )  # fmt: skip
    assert int(done.state.growth_state.step) == 60
    assert np.isfinite(done.losses).all()
    assert done.losses[0] < 1.2 * float(before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda job: larger(job, chunks=0), "holds an adapter that has no place"),
        (lambda job: mlp(spans=2)._replace(), None),
    ],
)
def test_what_lives_is_never_dropped(
    job: Job, restored: checkpoint.Restored, change: Any, message: str | None
) -> None:
    growth = change(job)
    growth = growth.growth if isinstance(growth, Job) else growth
    if message is None:
        runtime.enlarge(restored, growth, job.optimizer, key=KEY)
        return
    with pytest.raises(CheckpointError, match=message):
        runtime.enlarge(restored, growth, job.optimizer, key=KEY)


def test_refusals(job: Job, restored: checkpoint.Restored) -> None:
    def layout(**changes: Any) -> ef.Growth:
        old = job.growth.layout
        arguments = {
            "sites": old.sites,
            "blueprints": {"bottleneck": old.blueprints[0]},
            "capacity": 2,
            **changes,
        }
        return ef.Growth(**arguments, policy=job.growth.policy, graft=ef.grafting.linear(12))

    wide = [ef.site(job.growth.layout.sites[0].name, features=8, chunks=4)]
    for growth, message in (
        (layout(dtype=jax.numpy.bfloat16), "nothing is cast silently"),
        (layout(sites=[*wide, *job.growth.layout.sites[1:]]), "chunks was 2 and is 4"),
        (
            layout(blueprints={"other": ef.blueprints.bottleneck(4)}),
            r"blueprints \['bottleneck'\]",
        ),
        (layout(blueprints={"bottleneck": ef.blueprints.bottleneck(8)}), "must be the run's"),
    ):
        with pytest.raises(CheckpointError, match=message):
            runtime.enlarge(restored, growth, job.optimizer, key=KEY)
    with pytest.raises(CheckpointError, match=r"opt_state.host|must be the run's"):
        runtime.enlarge(restored, job.growth, ef.optim.per_adapter(optax.sgd(0.1)), key=KEY)
    with pytest.raises(CheckpointError, match="does not hold a whole run"):
        runtime.enlarge(
            restored._replace(value=restored.value["losses"]), job.growth, job.optimizer, key=KEY
        )


def test_host_only_and_seeds_only(job: Job, tmp_path: Path) -> None:
    with checkpoint.Writer(tmp_path, on_failure=fail) as writer:
        done = job.fit(num_steps=40, checkpoints=runtime.Checkpoints(writer=writer))
    host = checkpoint.restore(tmp_path, only="state/params").value
    assert_same(numbers(done.state.params), host)
    grown = checkpoint.restore(tmp_path, only="state/growth_state").value
    again = job._replace(params=host).fit(num_steps=5, start=grown)
    assert int(again.state.growth_state.step) == 45
    seeds = checkpoint.restore(tmp_path, only="state/growth_state/seeds").value
    assert_same(numbers(done.state.growth_state.seeds), seeds)


def test_onto_another_number_of_devices(tmp_path: Path) -> None:
    program = """
        import sys, jax, numpy as np, jax.numpy as jnp
        from jax.sharding import NamedSharding, PartitionSpec as P
        from esper_fn import checkpoint
        mesh = jax.sharding.Mesh(np.asarray(jax.devices()), ("data",))
        split = NamedSharding(mesh, P("data"))
        array = jax.device_put(jnp.arange(64.0).reshape(8, 8), split)
        if sys.argv[2] == "save":
            checkpoint.save(sys.argv[1], 1, {"x": array})
        else:
            found = jax.device_put(checkpoint.restore(sys.argv[1]).value["x"], split)
            assert (found == array).all()
            print(jax.device_count(), len(found.sharding.device_set))
    """

    def run(count: int, what: str) -> str:
        had = os.environ.get("XLA_FLAGS", "")
        flags = f"{had} --xla_force_host_platform_device_count={count}"
        return subprocess.run(
            [sys.executable, "-c", textwrap.dedent(program), str(tmp_path / "run"), what],
            check=True, capture_output=True, text=True, env={**os.environ, "XLA_FLAGS": flags},
        ).stdout  # fmt: skip

    run(4, "save")
    assert run(2, "restore") == "2 2\n"
