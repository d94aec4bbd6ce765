"""The grown network without its growing computes what the run computed."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import esper_fn as ef
from esper_fn import checkpoint, export, runtime
from esper_fn.demo import data, hosts, jobs
from esper_fn.errors import CheckpointError
from esper_fn.lifecycle import Stage


def alive(growth: ef.Growth, stages: dict[int, tuple[Stage, float, str]]) -> ef.GrowthState:
    """A state in which some seeds live, with adapters that do something."""
    tables = growth.layout.tables
    state = jax.jit(growth.init)(jax.random.key(0))
    rows, owner = jax.tree.map(np.array, state.seeds), np.array(state.owner)
    for seed, (stage, alpha, name) in stages.items():
        group = int(np.searchsorted(tables.group_start, seed, side="right")) - 1
        blueprint = growth.layout.blueprint_index(name)
        pool = tables.slot_pool_start == tables.pool_start[group, blueprint]
        slot = int(np.flatnonzero((owner == -1) & pool)[0])
        owner[slot], rows.slot[seed], rows.blueprint[seed] = seed, slot, blueprint
        rows.stage[seed], rows.alpha[seed] = stage, alpha
    leaves, structure = jax.tree.flatten(state.adapters)
    source = np.random.default_rng(3)
    drawn = [jnp.asarray(source.normal(size=x.shape) / 3, x.dtype) for x in leaves]
    return state._replace(
        seeds=jax.tree.map(jnp.asarray, rows),
        owner=jnp.asarray(owner),
        adapters=jax.tree.unflatten(structure, drawn),
    )


MLP = hosts.mlp((6, 8, 5, 7, 3), spans=2, chunks=2)
CONV = hosts.conv((8, 8, 1), (6, 7), hidden=5, classes=3, chunks=3)
TRANSFORMER = hosts.transformer(vocabulary=11, length=6, width=8, blocks=3, hidden=10, chunks=3)
LIVE = (Stage.FOSSILIZED, 1.0), (Stage.GRAFTING, 0.3), (Stage.FINE_TUNING, 1.0)


def case(name: str) -> tuple[Any, ef.Growth, ef.GrowthState, np.ndarray]:
    source = np.random.default_rng(0)
    host = {"mlp": MLP, "conv": CONV, "transformer": TRANSFORMER}[name]
    blueprints = {"bottleneck": ef.blueprints.bottleneck(4, "gelu")}
    if name == "conv":
        blueprints["conv"] = ef.blueprints.bottleneck_conv(3)
    growth = ef.Growth(sites=host.sites, blueprints=blueprints, capacity=3, adapters_at_once=None)
    stages = {
        seed: (
            *LIVE[i % 3],
            "conv" if growth.layout.locate(seed)[0].topology == "image" else "bottleneck",
        )
        for i, seed in enumerate(range(0, growth.layout.num_seeds, 2))
    }
    stages[1] = (Stage.TRAINING, 0.0, next(iter(stages.values()))[2])  # is no part of the network
    inputs = {
        "mlp": source.normal(size=(9, 6)).astype(np.float32),
        "conv": source.normal(size=(9, 8, 8, 1)).astype(np.float32),
        "transformer": source.integers(0, 11, (9, 6)).astype(np.int32),
    }[name]
    return host, growth, alive(growth, stages), inputs


@pytest.mark.parametrize("name", ["mlp", "conv", "transformer"])
def test_what_is_written_computes_what_the_run_does(name: str, tmp_path: Path) -> None:
    host, growth, state, inputs = case(name)
    params = jax.jit(host.init)(jax.random.key(1))
    expected, bare = jax.jit(
        lambda params, state, x: (
            host.apply(params, growth.seeds(state), x),
            host.apply(params, ef.NoSeeds(), x),
        )
    )(params, state, inputs)
    assert np.abs(expected - bare).max() > 1e-2
    adapters = export.acting_adapters(growth, state)
    assert 1 not in [adapter.seed for adapter in adapters]
    folded_params, rest, folded = export.fold(host.fold, growth.layout, params, adapters)
    assert bool(folded) == (name == "mlp")
    assert all(adapter.stage == "FOSSILIZED" for adapter in folded)

    file = tmp_path / "network.safetensors"
    export.write_safetensors(file, folded_params, rest, {"x": [1]})
    network = export.read_safetensors(file)
    assert network.note == {"x": [1]}
    seeds = export.fixed_seeds(growth.layout, network.adapters)
    outputs = jax.jit(host.apply)(network.params, seeds, inputs)
    np.testing.assert_allclose(outputs, expected, rtol=2e-4, atol=2e-5)

    export.write_stablehlo(tmp_path, lambda x: host.apply(folded_params, seeds, x), inputs)
    program = export.read_stablehlo(tmp_path)
    np.testing.assert_allclose(program(inputs), expected, rtol=2e-4, atol=2e-5)
    np.testing.assert_allclose(program(inputs[:2]), expected[:2], rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("birth", ["zero", "paired"])
def test_folded_spans_are_neurons_that_numpy_can_compute(birth: Any) -> None:
    growth = ef.Growth(
        sites=MLP.sites,
        blueprints={"bottleneck": ef.blueprints.bottleneck(4, "gelu", birth)},
        capacity=3,
        adapters_at_once=None,
    )
    spans = [s for s in range(growth.layout.num_seeds) if growth.layout.locate(s)[0].is_span]
    state = alive(growth, dict.fromkeys(spans, (Stage.FOSSILIZED, 1.0, "bottleneck")))
    params = jax.jit(MLP.init)(jax.random.key(1))
    folded, rest, folded_now = export.fold(
        MLP.fold, growth.layout, params, export.acting_adapters(growth, state)
    )
    assert (len(rest), len(folded_now)) == (0, 6)
    assert [layer["weight"].shape for layer in folded] == [(6, 16), (16, 13), (13, 15), (15, 3)]

    x = inputs = np.random.default_rng(0).normal(size=(9, 6))
    for k, layer in enumerate(folded):
        x = x @ np.asarray(layer["weight"], np.float64) + np.asarray(layer["bias"], np.float64)
        if k < 3:
            x = 0.5 * x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)))
    expected = jax.jit(lambda state, x: MLP.apply(params, growth.seeds(state), x))(
        state, jnp.asarray(inputs, jnp.float32)
    )
    np.testing.assert_allclose(x, expected, rtol=1e-4, atol=1e-5)


def test_relu_neurons_are_not_folded_into_a_gelu_layer() -> None:
    growth = ef.Growth(
        sites=MLP.sites, blueprints={"b": ef.blueprints.bottleneck(4, "relu")}, capacity=3
    )
    span = growth.layout.seed_index("layer1.0", 0)
    state = alive(growth, {span: (Stage.FOSSILIZED, 1.0, "b")})
    adapters = export.acting_adapters(growth, state)
    params = jax.jit(MLP.init)(jax.random.key(1))
    assert export.fold(MLP.fold, growth.layout, params, adapters) == (params, adapters, [])


def test_files_of_others_are_refused(tmp_path: Path) -> None:
    import safetensors.numpy

    file = tmp_path / "x.safetensors"
    for content in (b"", b"not a tensor", struct.pack("<Q", 2**60) + b"{}"):
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match="not readable"):
            export.read_safetensors(file)
    safetensors.numpy.save_file({"a": np.ones(2)}, file)
    with pytest.raises(CheckpointError, match="is not an esper-fn network"):
        export.read_safetensors(file)


def event(step: int, seed: int, source: str, target: str, cause: str = "gate:x") -> dict[str, Any]:
    return {
        "step": step, "seed": seed, "site": "s", "layer": 0, "chunk": seed, "blueprint": "b",
        "from": source, "to": target, "cause": cause, "measured": {"contribution": 0.5},
    }  # fmt: skip


def test_lineage_tells_every_life() -> None:
    events = [
        event(3, 1, "DORMANT", "GERMINATED", "policy:plateau"),
        event(4, 2, "DORMANT", "GERMINATED", "command"),
        event(5, 1, "GERMINATED", "TRAINING"),
        event(9, 1, "TRAINING", "GRAFTING"),
        event(12, 2, "GERMINATED", "CANCELLED", "dwell_limit"),
        event(15, 1, "GRAFTING", "STABILIZATION"),
        event(20, 2, "CANCELLED", "DORMANT"),
        event(30, 1, "FINE_TUNING", "FOSSILIZED", "gate:contribution_high"),
        event(40, 2, "DORMANT", "GERMINATED", "policy:plateau"),
    ]
    adapter = export.Adapter(1, "s", 0, 1, "b", "FOSSILIZED", 1.0, {})
    written = export.lineage(events, [{"step": 7}], folded=[adapter], note={"a": 1})
    first, second, third = written["lives"]
    assert (first["requested_by"], second["requested_by"], third["requested_by"]) == (
        "policy:plateau", "command", "policy:plateau",
    )  # fmt: skip
    assert [first[f"{name}_step"] for name in ("germinated", "training", "graft_began")] == [
        3,
        5,
        9,
    ]
    assert (first["graft_ended_step"], first["fate"], first["fate_step"]) == (15, "FOSSILIZED", 30)
    assert first["exported_as"] == "folded"
    assert first["verdicts"][-1]["cause"] == "gate:contribution_high"
    assert (second["fate"], second["exported_as"]) == ("CANCELLED", None)
    assert (third["fate"], third["germinated_step"]) == (None, 40)
    assert written["rollbacks"] == [{"step": 7}]


def test_a_run_folder(tmp_path: Path) -> None:
    """A folder as `esper grow` writes it, without the training that fills it."""
    dataset = data.load("digits")
    comparison = jobs.prepare(jobs.get("digits"), dataset, steps=400)
    growth = comparison.growth
    live = {
        growth.layout.seed_index("layer2.0", 0): (Stage.FOSSILIZED, 1.0, "bottleneck"),
        growth.layout.seed_index("hidden1", 2): (Stage.GRAFTING, 0.4, "bottleneck"),
    }
    params = jax.jit(comparison.host.init)(jax.random.key(0))
    state = jax.jit(lambda params, grown: runtime.init(comparison.optimizer, params, grown))(
        params, alive(growth, live)
    )
    folder = tmp_path / "run" / "checkpoints" / "seed-3" / "grown"
    settings = {"data": "digits", "policy": "grow", "steps": 400, "seed": 3}
    measured = {"contribution": {"$float": "nan"}}
    events = [event(1, 0, "DORMANT", "GERMINATED") | {"measured": measured}]
    record = {
        "settings": settings, "note": None, "record": {"events": events, "rollbacks": []},
    }  # fmt: skip
    checkpoint.save(folder, 400, {"state": state, "losses": np.zeros(400)}, record=record)
    for kind in jobs.FORMATS:
        written = jobs.export_run(tmp_path / "run", tmp_path / kind, format=kind)
        assert (written["adapters"], written["folded"], written["step"]) == (1, 1, 400)
        assert written["exported_test_accuracy"] == pytest.approx(
            written["test_accuracy"], abs=0.003
        )
        lives = json.loads((tmp_path / kind / "lineage.json").read_text())
        assert lives["note"]["seed"] == 3
        assert lives["lives"][0]["germinated_step"] == 1
    with pytest.raises(CheckpointError, match=r"no seed 4; there are \[3\]"):
        jobs.export_run(tmp_path / "run", tmp_path / "out", seed=4)
    with pytest.raises(CheckpointError, match="no checkpoint of the arm 'random'"):
        jobs.export_run(tmp_path / "run", tmp_path / "out", arm="random")
