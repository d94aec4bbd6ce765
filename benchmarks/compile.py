"""What a growing network costs to compile, and what a small step costs to call.

Processor seconds of tracing, lowering and XLA together, without a persistent cache, and lines of
StableHLO, of a tiny dense host: the bare training step, the growing one, and its parts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import esper_fn as ef
from benchmarks._timing import Row, ratio, summarise, time_interleaved

WIDTH = 16
BATCH = 8
FACTORIES: dict[str, Callable[[], Any]] = {
    "low_rank": partial(ef.blueprints.low_rank, rank=2),
    "bottleneck": partial(ef.blueprints.bottleneck, width=2),
    "scale_shift": ef.blueprints.scale_shift,
    "gated": partial(ef.blueprints.gated, width=2),
}


class Program(NamedTuple):
    """A function to compile, and arguments for it."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]


def measure(*, quick: bool) -> Mapping[str, Row]:
    """All rows; `quick` takes fewer samples."""
    jax.config.update("jax_enable_compilation_cache", False)
    repeats = 1 if quick else 3
    rows: dict[str, Row] = {}
    for num_sites, num_blueprints in ((1, 1),) if quick else ((1, 1), (1, 2), (1, 4), (12, 1)):
        rows |= _compilations(num_sites, num_blueprints, repeats)
    rows |= _population(1, repeats)
    for num_sites in (1,) if quick else (1, 4, 8):
        rows |= _calls(num_sites, repeats=20 if quick else 300)
    return rows


def _compilations(num_sites: int, num_blueprints: int, repeats: int) -> dict[str, Row]:
    """The bare step, the whole growing step and its parts, compiled in turns."""
    programs = _programs(num_sites, num_blueprints)
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    lines = {}
    for _ in range(repeats):
        for name, program in programs.items():
            taken, lines[name] = _compile(program)
            seconds[name].append(taken)
    label = f"{num_sites}_sites_{num_blueprints}_blueprints"
    rows = {
        f"{label}_{name}": summarise(samples, "s", stablehlo_lines=lines[name])
        for name, samples in seconds.items()
    }
    rows[f"{label}_over_bare"] = ratio(
        seconds["whole"], seconds["bare"], note="processor seconds to compile one training step"
    )
    return rows


def _population(num_sites: int, repeats: int) -> dict[str, Row]:
    """The same of a hundred networks under `vmap`."""
    programs = _programs(num_sites, 1, adapters_at_once=None)
    seconds: dict[str, list[float]] = {"bare": [], "whole": []}
    for _ in range(repeats):
        for name, samples in seconds.items():
            function, arguments = programs[name]
            stacked = jax.tree.map(lambda leaf: jnp.stack([leaf] * 100), arguments)
            samples.append(_compile(Program(jax.vmap(function), stacked))[0])
    return {
        "vmapped_bare": summarise(seconds["bare"], "s"),
        "vmapped_whole": summarise(seconds["whole"], "s"),
        "vmapped_over_bare": ratio(seconds["whole"], seconds["bare"]),
    }


def _calls(num_sites: int, *, repeats: int) -> dict[str, Row]:
    """One step called from Python."""
    programs = _programs(num_sites, 1)
    runners: dict[str, Callable[[], object]] = {}
    for name in ("bare", "whole"):
        function, arguments = programs[name]
        compiled = jax.jit(function).lower(*arguments).compile()
        runners[name] = partial(_call, compiled, arguments)
    samples = time_interleaved(runners, repeats=repeats, warmup=10)
    return {
        f"call_{num_sites}_sites": summarise(samples["whole"], "us"),
        f"call_{num_sites}_sites_bare": summarise(samples["bare"], "us"),
    }


def _call(compiled: Any, arguments: tuple[Any, ...]) -> None:
    jax.block_until_ready(compiled(*arguments))


def _compile(program: Program) -> tuple[float, int]:
    """Processor seconds and StableHLO lines."""
    jax.clear_caches()
    start = time.process_time()
    lowered = jax.jit(program.function).lower(*program.arguments)
    lowered.compile()
    taken = time.process_time() - start
    return taken, lowered.as_text().count("\n")


def _host(num_sites: int) -> Any:
    keys = jax.random.split(jax.random.key(0), num_sites + 1)
    return [jax.random.normal(key, (WIDTH, WIDTH)) / 4 for key in keys]


def _bare_loss(params: Any, batch: Any) -> jax.Array:
    h = batch[0]
    for matrix in params[:-1]:
        h = jax.nn.relu(h @ matrix)
    return jnp.mean((h @ params[-1] - batch[1]) ** 2)


def _loss(params: Any, seeds: Any, batch: Any) -> jax.Array:
    h = batch[0]
    for index, matrix in enumerate(params[:-1]):
        h = seeds.grow(f"hidden{index}", jax.nn.relu(h @ matrix))
    return jnp.mean((h @ params[-1] - batch[1]) ** 2)


def _programs(
    num_sites: int, num_blueprints: int, *, adapters_at_once: int | None = 1
) -> dict[str, Program]:
    names = list(FACTORIES)[:num_blueprints]
    growth = ef.Growth(
        sites=[ef.site(f"hidden{i}", features=WIDTH, chunks=4) for i in range(num_sites)],
        blueprints={name: FACTORIES[name]() for name in names},
        capacity=2,
        adapters_at_once=adapters_at_once,
    )
    host = optax.adamw(1e-3)
    optimizer = ef.optim.per_adapter(host)
    params = _host(num_sites)
    batch = (jnp.ones((BATCH, WIDTH)), jnp.ones((BATCH, WIDTH)))
    state = growth.init(jax.random.key(1))
    opt_state = optimizer.init((params, state.adapters))
    commands = growth.commands()

    def gradients(params: Any, state: Any, batch: Any) -> Any:
        return growth.value_and_grad(_loss)(params, state, batch)

    def optimise(slopes: Any, opt_state: Any, params: Any, state: Any) -> Any:
        return optimizer.update(
            slopes, opt_state, (params, state.adapters), slots=growth.slots(state)
        )

    def step(params: Any, state: Any, opt_state: Any, batch: Any, commands: Any) -> Any:
        loss, slopes, statistics = gradients(params, state, batch)
        updates, opt_state = optimise(slopes, opt_state, params, state)
        params, adapters = optax.apply_updates((params, state.adapters), updates)
        state, info = growth.update(state, adapters, statistics, loss, commands)
        return params, state, opt_state, info

    def survey(params: Any, state: Any, batch: Any) -> Any:
        return growth.survey(_loss)(params, state, batch)

    def whole(params: Any, state: Any, opt_state: Any, batch: Any, commands: Any) -> Any:
        state, measured = jax.lax.cond(
            state.step % 25 == 0,
            survey,
            _skip_survey(survey, params, state, batch),
            params,
            state,
            batch,
        )
        return *step(params, state, opt_state, batch, commands), measured

    def bare(params: Any, opt_state: Any, batch: Any) -> Any:
        loss, slopes = jax.value_and_grad(_bare_loss)(params, batch)
        updates, opt_state = host.update(slopes, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    loss, slopes, statistics = jax.jit(gradients)(params, state, batch)
    return {
        "bare": Program(bare, (params, host.init(params), batch)),
        "whole": Program(whole, (params, state, opt_state, batch, commands)),
        "step": Program(step, (params, state, opt_state, batch, commands)),
        "value_and_grad": Program(gradients, (params, state, batch)),
        "optimizer": Program(optimise, (slopes, opt_state, params, state)),
        "update": Program(growth.update, (state, state.adapters, statistics, loss, commands)),
        "survey": Program(survey, (params, state, batch)),
        "init": Program(growth.init, (jax.random.key(1),)),
    }


def _skip_survey(survey: Callable[..., Any], *arguments: Any) -> Callable[..., Any]:
    """A function like `survey` that measures nothing."""
    _, shapes = jax.eval_shape(survey, *arguments)

    def skip(params: Any, state: Any, batch: Any) -> Any:
        del params, batch
        return state, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    return skip
