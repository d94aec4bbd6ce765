# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Steering a run from elsewhere
#
# A growing network trains on one machine, and you sit at another. This notebook starts a Redis
# server of its own and trains a small network in a thread. Over the bus alone it then asks seeds to
# grow, watches them, pauses the run, and stops it.

# %%
# %matplotlib inline
# %config InlineBackend.figure_formats = ["retina"]
import threading

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import esper_fn as ef
from esper_fn import bus, runtime

# %% [markdown]
# ## A run on a bus
#
# The server is private to this notebook: only you can open its socket. Elsewhere, name your own, such
# as `redis://127.0.0.1:6379/0`; `memory` is a bus inside this process.

# %%
server = bus.PrivateServer()
server.start()

growth = ef.Growth(
    sites=[ef.site("hidden", features=16, chunks=4)],
    blueprints={"bottleneck": ef.blueprints.bottleneck(width=8)},
    capacity=4,
    policy=ef.policies.never(),
    graft=ef.grafting.linear(num_steps=50),
)

key_in, key_out, key_data, key_run = jax.random.split(jax.random.key(0), 4)
params = {
    "in": jax.random.normal(key_in, (8, 16)) / 3,
    "out": jax.random.normal(key_out, (16, 1)) / 4,
}
inputs = np.asarray(jax.random.normal(key_data, (512, 8)))
targets = np.sin(2 * inputs[:, :1]) * inputs[:, 1:2]


def loss_fn(params, seeds, batch):
    x, y = batch
    hidden = seeds.grow("hidden", jnp.tanh(x @ params["in"]))
    return jnp.mean((hidden @ params["out"] - y) ** 2)


def batches(first, count):
    rows = (np.arange(first, first + count)[:, None] * 64 + np.arange(64)) % 512
    return inputs[rows], targets[rows]


def train():
    with runtime.steer(server.url, growth, run="notebook") as steering:
        runtime.fit(
            growth,
            loss_fn,
            ef.optim.per_adapter(optax.adam(3e-3)),
            params,
            batches,
            num_steps=1_000_000,
            key=key_run,
            survey_batch=(inputs[:128], targets[:128]),
            options=runtime.FitOptions(segment_steps=5),
            steering=steering,
        )


run = threading.Thread(target=train)
run.start()

# %% [markdown]
# ## Asking for growth
#
# `send` waits for the outcome of a command. A refusal says why.

# %%
client = bus.connect(server.url, run="notebook")
while "notebook" not in client.active_runs():
    run.join(0.1)

for seed in (0, 1):
    command = bus.Germinate(site="hidden", seed=seed, blueprint="bottleneck")
    print(client.send(command, wait_seconds=120))
refused = client.send(bus.Germinate(site="hidden", seed=0, blueprint="bottleneck"))
print(refused.code, "-", refused.text)

# %% [markdown]
# If you are unsure whether a command arrived, send it again: a command with the same id is answered
# and not repeated.

# %%
again = client.send(command)
print(again.step, again.code)

# %% [markdown]
# ## Watching
#
# The run publishes the scalars of its steps, the state of all seeds, and every change of a stage. It
# waits for nobody.

# %%
metrics, events = [], []
for message in client.watch(seconds=15, from_beginning=True):
    if isinstance(message, bus.StepMetrics):
        metrics.append(message)
    elif isinstance(message, bus.LifecycleEvent):
        events.append(message)
    if message.topic is bus.Topic.TELEMETRY and message.step > 1500:
        break

for event in events[:8]:
    print(f"step {event.step}: seed {event.seed} {event.source} -> {event.target}, {event.cause}")

# %%
figure, axes = plt.subplots(figsize=(7, 3))
axes.plot([m.step for m in metrics], [m.loss for m in metrics], linewidth=0.8)
for event in events:
    axes.axvline(event.step, color="0.8", linewidth=0.6, zorder=0)
axes.set(xlabel="step", ylabel="loss", yscale="log", title="what the run published")
plt.show()

# %% [markdown]
# ## Several seeds at once, pausing, stopping
#
# A batch is applied whole or not at all. A paused run stands still between two steps. A stop
# overtakes the commands that wait.

# %%
both = bus.Batch(
    commands=(
        bus.Germinate(site="hidden", seed=2, blueprint="bottleneck"),
        bus.Cull(site="hidden", seed=3),  # sleeps: cannot be culled
    )
)
outcome = client.send(both)
print(outcome.code, [seed.code for seed in outcome.seeds])

print(client.send(bus.Pause()).text)
print(client.send(bus.Resume()).text)
print(client.send(bus.Stop(reason="seen enough", sender="notebook")).text)
run.join()

# %%
client.close()
server.stop()
