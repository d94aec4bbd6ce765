"""The same host, seeds, data and commands in JAX and in torch live the same life."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from torch import nn

import esper_fn as ef
import torch_bridge
from esper_fn.lifecycle import Stage
from esper_fn.types import Layout

STEPS, SURVEY_EVERY = 200, 10
QUICK = {"xla_backend_optimization_level": 0}
"""Compiles a third quicker; for tests of numbers."""
WIDTHS = (12, 30, 16, 4)


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(12, 30)
        self.fc2 = nn.Linear(30, 16)
        self.out = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.relu(self.fc2(torch.relu(self.fc1(x)))))


SETTINGS = partial(
    ef.lifecycle.settings,
    min_steps=dict.fromkeys(
        (
            Stage.TRAINING,
            Stage.GRAFTING,
            Stage.STABILIZATION,
            Stage.EVALUATING,
            Stage.FINE_TUNING,
        ),
        10,
    ),
    embargo_steps=15,
    utility_variation=100.0,
    loss_variation=1.0,
)
BLUEPRINTS = {
    "bottleneck": ef.blueprints.bottleneck(4),
    "low_rank": ef.blueprints.low_rank(2),
    "scale_shift": ef.blueprints.scale_shift(),
}
OPTIONS: dict[str, Any] = {
    "graft": ef.grafting.linear(num_steps=20),
    "directed_births": 2,
}


def policy() -> ef.policies.Policy:
    return ef.policies.chain(
        ef.policies.periodic(every=15, start=12), ef.policies.max_concurrent(4)
    )


def data() -> tuple[np.ndarray, np.ndarray]:
    source = np.random.default_rng(0)
    x = source.standard_normal((STEPS + 1, 32, 12)).astype(np.float32)
    teacher = source.standard_normal((12, 4)).astype(np.float32)
    return x, np.tanh(x @ teacher) ** 2


def commands_at(step: int, layout: Layout) -> list[Any]:
    options = {
        20: [ef.commands.germinate(layout.seed_index("fc2", 1), "scale_shift")],
        33: [ef.commands.germinate(layout.seed_index("fc1", 3), "low_rank")],
        50: [ef.commands.cull(layout.seed_index("fc1", 3)), ef.commands.cull(0)],
    }
    return options.get(step, [])


class InJax:
    """The README's step."""

    def __init__(self, model: Mlp, seed: int, settings: Any, x: np.ndarray, y: np.ndarray) -> None:
        sites = [
            ef.site("fc1", features=30, chunks=4),
            ef.site("fc2", features=16, chunks=4),
        ]
        self.growth = growth = ef.Growth(
            sites=sites,
            blueprints=BLUEPRINTS,
            capacity=3,
            policy=policy(),
            settings=settings,
            **OPTIONS,
        )
        self.state = growth.init(jax.random.key(seed))
        self.params = {
            name: jnp.asarray(p.detach().numpy().copy()) for name, p in model.named_parameters()
        }
        optimizer = ef.optim.per_adapter(optax.adamw(3e-3, weight_decay=0.01))
        self.opt_state = optimizer.init((self.params, self.state.adapters))
        self.x, self.y = x, y

        def predict(params: Any, seeds: Any, x: Any) -> Any:
            h = x
            for name in ("fc1", "fc2"):
                h = h @ params[f"{name}.weight"].T + params[f"{name}.bias"][None]
                h = jax.nn.relu(seeds.grow(name, h))
            return h @ params["out.weight"].T + params["out.bias"][None]

        def loss_fn(params: Any, seeds: Any, x: Any, y: Any) -> Any:
            return jnp.mean(jnp.square(predict(params, seeds, x) - y))

        def with_outputs(params: Any, seeds: Any, x: Any, y: Any) -> Any:
            results = predict(params, seeds, x)
            return jnp.mean(jnp.square(results - y)), results

        def look(params: Any, adapters: Any, state: Any, x: Any, y: Any) -> Any:
            state = state._replace(adapters=adapters)
            requests = growth.value_and_grad(with_outputs, has_aux=True)
            (_, results), grads, _ = requests(params, state, x, y)
            return results, *grads

        @partial(jax.jit, compiler_options=QUICK)
        def step(params: Any, state: Any, opt_state: Any, x: Any, y: Any, commands: Any) -> Any:
            loss, grads, statistics = growth.value_and_grad(loss_fn)(params, state, x, y)
            updates, opt_state = optimizer.update(
                grads, opt_state, (params, state.adapters), slots=growth.slots(state)
            )
            params, adapters = optax.apply_updates((params, state.adapters), updates)
            state, info = growth.update(state, adapters, statistics, loss, commands)
            return params, state, opt_state, info, grads[0]

        self._step = step
        self._look = jax.jit(look, compiler_options=QUICK)
        self._survey = jax.jit(growth.survey(loss_fn), compiler_options=QUICK)

    def step(self, position: int) -> Any:
        commands = self.growth.commands(commands_at(position, self.growth.layout))
        self.params, self.state, self.opt_state, info, grads = self._step(
            self.params, self.state, self.opt_state, self.x[position], self.y[position], commands
        )
        return info, grads

    def look(self, position: int, params: Any, adapters: Any) -> Any:
        """Outputs and gradients of these parameters with the seeds as they are."""
        results = self._look(params, adapters, self.state, self.x[position], self.y[position])
        return jax.tree.map(np.asarray, results)

    def survey(self) -> Any:
        self.state, info = self._survey(self.params, self.state, self.x[-1], self.y[-1])
        return info


def banks_of(bridge: Any) -> list[tuple[Any, Any]]:
    return [(site, bank) for site in bridge.sites for bank in site.bank_slots]


def adapters_of(bridge: Any, part: Any) -> Any:
    """Something of every parameter of the adapters, in the order of the core: site, bank, leaf."""
    results: dict[str, dict[str, dict[str, np.ndarray]]] = {}
    for site, bank in banks_of(bridge):
        adapters = site.get_submodule(bank.name)
        results.setdefault(site.site, {})[bank.name] = {
            name: np.stack([part(getattr(adapter, name)) for adapter in adapters])
            for name in site.names_of(bank.name)
        }
    return results


def numbers(p: torch.Tensor) -> np.ndarray:
    return p.detach().numpy()


def slopes(p: torch.Tensor) -> np.ndarray:
    return np.zeros(p.shape, np.float32) if p.grad is None else p.grad.numpy()


def close(mine: Any, expected: np.ndarray) -> None:
    scale = np.abs(expected).max()
    np.testing.assert_allclose(mine, expected, rtol=1e-4, atol=5e-4 * scale + 1e-9)


@pytest.mark.parametrize("train_first", [False, True])
def test_two_hundred_steps_through_a_full_lifecycle(train_first: bool) -> None:
    settings = SETTINGS(train_first=train_first)
    torch.manual_seed(0)
    model = Mlp()
    x, y = data()
    ours = InJax(model, 5, settings, x, y)
    bridge = torch_bridge.grow(
        model,
        targets=["fc1", "fc2"],
        chunks=4,
        blueprints=BLUEPRINTS,
        capacity=3,
        policy=policy(),
        seed=5,
        watch_every=1,
        verbose=False,
        settings=settings,
        **OPTIONS,
    )
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.01)
    tx, ty = torch.from_numpy(x), torch.from_numpy(y)

    def loss_at(step: int) -> torch.Tensor:
        return (model(tx[step]) - ty[step]).square().mean()

    seen: set[int] = set()
    for step in range(STEPS):
        outputs = model(tx[step])
        loss = (outputs - ty[step]).square().mean()
        loss.backward()
        grads = {
            name: p.grad.clone() for name, p in model.named_parameters() if "seeds" not in name
        }
        host = {name: p.detach().numpy() for name, p in model.named_parameters() if name in grads}
        expected, host_grads, adapter_grads = ours.look(step, host, adapters_of(bridge, numbers))
        # At the same numbers, to float32 tolerance: what 200 steps round differently is not in it.
        np.testing.assert_allclose(outputs.detach(), expected, rtol=1e-5, atol=1e-5)
        jax.tree.map(close, grads, host_grads)
        jax.tree.map(close, adapters_of(bridge, slopes), dict(adapter_grads))
        optimizer.step()
        optimizer.zero_grad()
        info = bridge.step(loss, commands_at(step, bridge.layout))
        options, d_params = ours.step(step)
        np.testing.assert_array_equal(info.stage, options.stage, err_msg=f"step {step}")
        np.testing.assert_array_equal(info.outcomes.code, options.outcomes.code)
        np.testing.assert_allclose(info.loss, options.loss, rtol=1e-3)
        for name, grad in grads.items():
            np.testing.assert_allclose(grad, d_params[name], rtol=2e-2, atol=2e-4, err_msg=name)
        seen |= set(info.stage.tolist())
        if step % SURVEY_EVERY == SURVEY_EVERY - 1:
            results, expected = bridge.survey(lambda: loss_at(-1)), ours.survey()
            np.testing.assert_allclose(results.potential, expected.potential, rtol=2e-2, atol=1e-3)
            np.testing.assert_array_equal(results.ablated, expected.ablated)
            np.testing.assert_allclose(results.contribution, expected.contribution, atol=1e-4)
    life = {*range(Stage.DORMANT, Stage.FOSSILIZED + 1), Stage.CULLED}
    life -= set() if train_first else {Stage.TRAINING}
    assert seen >= {int(stage) for stage in life}, seen
    np.testing.assert_allclose(
        bridge.state.seeds.telemetry.utility,
        ours.state.seeds.telemetry.utility,
        rtol=5e-2,
        atol=1e-4,
    )
    own = adapters_of(bridge, numbers)
    for site, bank in banks_of(bridge):
        holder = np.asarray(bridge.state.owner)[bank.start : bank.start + bank.num_slots] >= 0
        for name, leaf in ours.state.adapters[site.site][bank.name].items():
            mine = own[site.site][bank.name][name]
            np.testing.assert_allclose(mine[holder], leaf[holder], rtol=2e-2, atol=2e-3)
