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
# # From a plain Flax and Optax loop to a growing one
#
# You have a network that is too small in one place. You do not know which place, nor how much is
# missing, and you would rather not start again. *Growth* means: while the network trains, small
# new networks are born in it where a measurement promises most, learn together with it, are
# measured, and are removed where they do not help.
#
# This notebook takes a plain training loop, adds growth to it line by line, looks at what happens,
# steers it by hand, and ends with an honest comparison. It runs on a laptop CPU in two or three
# minutes, most of which XLA spends compiling.

# %%
# %matplotlib inline
# %config InlineBackend.figure_formats = ["retina"]
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx

import esper_fn as ef
from esper_fn.demo import jobs
from esper_fn.demo.data import batch_indices, load

# %% [markdown]
# ## 1. A plain loop, and a network that is too narrow
#
# The data are scikit-learn's 8 x 8 digits: 1200 to train on, 237 to validate, 360 to test. The
# network has four layers, and one of them is a mistake: everything has to pass through **one
# single unit**.

# %%
data = load("digits")
train_x, train_y = data.train_inputs, data.train_targets
test_x, test_y = data.test_inputs, data.test_targets
held_out = (data.validation_inputs, data.validation_targets)


class Classifier(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(64, 32, rngs=rngs)
        self.narrow = nnx.Linear(32, 1, rngs=rngs)
        self.wide = nnx.Linear(1, 32, rngs=rngs)
        self.last = nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, x):
        hidden = nnx.gelu(self.first(x))
        middle = nnx.gelu(self.narrow(hidden))
        late = nnx.gelu(self.wide(middle))
        return self.last(late)


# %% [markdown]
# The loop is the usual one: split the module once into its structure and its parameters, then
# plain `jax.jit` and Optax.

# %%
structure, params = nnx.split(Classifier(nnx.Rngs(0)), nnx.Param)
adam = optax.adamw(3e-3)


@jax.jit
def plain_step(params, opt_state, batch):
    def loss_fn(params):
        x, y = batch
        logits = nnx.merge(structure, params)(x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    loss, grads = jax.value_and_grad(loss_fn)(params)
    updates, opt_state = adam.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, loss


opt_state = adam.init(params)
for rows in batch_indices(train_x, train_y, batch_size=64, num_steps=400, seed=0):
    params, opt_state, loss = plain_step(params, opt_state, (train_x[rows], train_y[rows]))

host = params  # the starting point of everything below
predicted = nnx.merge(structure, host)(test_x).argmax(-1)
print(f"after 400 steps: {jnp.mean(predicted == test_y):.1%} of the test digits are right")

# %% [markdown]
# A network of this kind without the mistake reaches about 97 %. From here on we treat this one as
# *given*, as you would a pretrained network, and call it the **host**.
#
# ## 2. The same loop, growing
#
# **Where.** One `ef.nnx.Grow` line marks a place, called a **site**. A site splits its features
# into chunks, and each chunk gets a **seed**: a spot where something may grow. With `source=`, what
# grows reads one activation and writes into a later one; around the narrow layer this gives the
# layer more units (with two chunks, each seed's units serve one half of the features). We mark
# three places and do not say which one is the mistake.


# %%
class GrowingClassifier(Classifier):
    def __init__(self, rngs):
        super().__init__(rngs)
        self.grow_hidden = ef.nnx.Grow("hidden", chunks=4)
        self.grow_middle = ef.nnx.Grow("middle", chunks=2)
        self.grow_late = ef.nnx.Grow("late", chunks=4)

    def __call__(self, x):
        hidden = self.grow_hidden(nnx.gelu(self.first(x)))
        middle = nnx.gelu(self.narrow(hidden))
        late = nnx.gelu(self.grow_middle(self.wide(middle), source=hidden))
        return self.last(self.grow_late(late))


growing = GrowingClassifier(nnx.Rngs(0))
structure = nnx.graphdef(growing)  # no new parameters: `host` still fits

# %% [markdown]
# **What.** `ef.discover_sites` runs the model in the abstract and finds the sites. `ef.Growth` puts
# together sites, **blueprints** (the kinds of small network that may grow; here 8 hidden units),
# and the room for live **adapters** (networks made from a blueprint). Memory follows this capacity.
#
# **When.** A policy asks for growth. The default one asks in the first step, wherever a survey (see
# below) promises at least a third of the best, and again every hundred steps as long as it pays.
# When and for how long an adapter is tried and measured is for the settings to say; all have
# defaults.

# %%
sites = ef.discover_sites(growing, train_x[:1])
growth = ef.Growth(
    sites=sites,
    blueprints={"units": ef.blueprints.bottleneck(width=8, activation="gelu")},
    capacity=2,
    adapters_at_once=None,  # one compiled variant: quick to compile, and small adapters cost little anyway
)
optimizer = ef.optim.per_adapter(adam)  # the host's Adam, and one of its own for every adapter

for site in sites:
    print(f"{site.name:7} {site.chunks} seeds over {site.features} features")

# %% [markdown]
# **The step.** The loss function gets `seeds` as a second argument and puts them in scope around
# the model. In the step, four calls take the place of three. Seeds, adapters, policy and random
# keys are one pytree, `state`, which goes in and comes out like the optimiser's.


# %%
def loss_fn(params, seeds, batch):
    x, y = batch
    with ef.use_seeds(seeds):
        logits = nnx.merge(structure, params)(x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


@jax.jit
def step(params, state, opt_state, batch, commands):
    loss, grads, statistics = growth.value_and_grad(loss_fn)(params, state, batch)
    updates, opt_state = optimizer.update(
        grads, opt_state, (params, state.adapters), slots=growth.slots(state)
    )
    params, adapters = optax.apply_updates((params, state.adapters), updates)
    state, info = growth.update(state, adapters, statistics, loss, commands)
    return params, state, opt_state, info


@jax.jit
def accuracy(params, seeds):
    with ef.use_seeds(seeds):
        return jnp.mean(nnx.merge(structure, params)(test_x).argmax(-1) == test_y)


survey = jax.jit(growth.survey(loss_fn))

# %% [markdown]
# **Where would it pay?** Now and then a **survey** on held-out data scores, from gradients alone,
# how much something growing at each seed could help (its *potential*). For adapters that are on
# trial it also measures by how much the loss would rise without them (their *contribution*). The
# first survey already finds the mistake:

# %%
state = growth.init(jax.random.key(0))
state, found = survey(host, state, held_out)

labels = [f"{site.name} {chunk}" for site in sites for chunk in range(site.chunks)]
fig, axes = plt.subplots(figsize=(7, 2.8), layout="constrained")
axes.barh(labels, found.potential, color="#0b6fb8", height=0.7)
axes.invert_yaxis()
axes.tick_params(axis="y", length=0)
axes.spines[["top", "right", "left"]].set_visible(False)
axes.set_xlabel("growth potential")
axes.set_title("What each seed could gain", loc="left")
plt.show()

# %% [markdown]
# **Train.** The loop has one new line, the survey. We run every program once, which compiles it,
# and from then on count what XLA compiles.

# %%
nothing = growth.commands()


def train(params, state, opt_state, order, commands=nothing):
    infos = []
    for i, rows in enumerate(order):
        if i % 25 == 0:
            state, _ = survey(params, state, held_out)
        batch = (train_x[rows], train_y[rows])
        asked = commands if i == 0 else nothing
        params, state, opt_state, info = step(params, state, opt_state, batch, asked)
        infos.append(info)
    infos = jax.tree.map(lambda *each: np.stack(each), *jax.device_get(infos))
    return params, state, opt_state, infos


order = batch_indices(train_x, train_y, batch_size=64, num_steps=600, seed=1)
opt_state = optimizer.init((host, state.adapters))
train(host, state, opt_state, order[:1])
before = accuracy(host, growth.seeds(state))

with ef.runtime.count_compilations() as count:
    params, state, opt_state, infos = train(host, state, opt_state, order)
    after = accuracy(params, growth.seeds(state))
print(f"test accuracy: {before:.1%} before, {after:.1%} after")
print(f"programs compiled while it grew: {count.num_compiled}")

# %% [markdown]
# Adapters were born, let in, measured and kept, and no program was compiled anew: whether a seed
# sleeps or acts is data, not structure.
#
# **What happened?** Every change of a seed is an event, with its cause and what was measured.

# %%
events = ef.runtime.lifecycle_events(growth, infos, first_step=0)
for event in events:
    measured = ", ".join(f"{name} {value:.3f}" for name, value in event["measured"].items())
    print(
        f"{event['step']:4}  {event['site']} {event['chunk']}  "
        f"{event['from']:>13} -> {event['to']:13}  {event['cause']:28} {measured}"
    )

# %% [markdown]
# Read one life from top to bottom:
#
# | stage | what the adapter does |
# |---|---|
# | dormant | there is none; the seed only watches |
# | germinated | newborn; its output is zero, so the host computes what it computed before |
# | grafting | acts and learns; its share *alpha* goes from 0 to 1, by default at once |
# | stabilization | acts and learns until the loss has settled, but not for ever |
# | evaluating | is measured: is the held-out loss higher without it? |
# | fine-tuning | measured again, before the decision |
# | fossilized | kept for good, and learns on with the host; or **culled**, that is removed, where
# it did not help |
#
# An adapter that acts gets its exact gradient, as if it had been part of the network from the
# start. With `ef.lifecycle.settings(train_first=True)` it passes one stage more, *training*: it
# learns behind the host, which does not change by a single bit until the adapter is grafted.
#
# A cause says who moved the seed: a rule of the policy, a command, the gate that opened last, or
# the dwell limit, because no stage may last for ever. A single seed can be read at any time:

# %%
growth.seed(state, growth.layout.seed_index("middle", chunk=0))

# %% [markdown]
# ## 3. The ready loop, with pictures
#
# `ef.runtime.fit` is the loop above, plus what one would have to add sooner or later: many steps in
# one `lax.scan`, snapshots and roll-back when the loss diverges, a listener between segments. It
# starts from the same host. So does `fit_host`, which trains the same loss on the same batches
# without growth: growing has to beat *simply training on*.
#
# A listener for each writes what it is told to a run folder, from which the pictures are drawn.

# %%
batches = ef.runtime.array_batches(train_x, train_y, batch_size=64, num_steps=600, seed=1)
folder = ef.report.create(Path(tempfile.mkdtemp()) / "quickstart")
host_size = sum(leaf.size for leaf in jax.tree.leaves(host))


def record_host(segment):
    folder.append_metrics(
        {
            "arm": "host",
            "step": segment.first_step + segment.num_steps,
            "loss": segment.losses.mean(),
            "test_accuracy": accuracy(segment.state, ef.NoSeeds()),
            "parameters": host_size,
        }
    )


def record_grown(segment):
    state, infos = segment.state, segment.infos
    for event in segment.events:
        folder.append_event({"arm": "grown", **event})
    folder.append_metrics(
        {
            "arm": "grown",
            "step": segment.first_step + segment.num_steps,
            "loss": segment.losses.mean(),
            "test_accuracy": accuracy(state.params, growth.seeds(state.growth)),
            "parameters": host_size + int(infos.num_parameters[-1]),
            "stages": ef.runtime.stage_counts(infos.stage[-1]),
            "alpha": {
                str(seed): infos.alpha[-1, seed]
                for seed in np.flatnonzero(infos.blueprint[-1] >= 0)
            },
        }
    )


ef.runtime.fit_host(loss_fn, adam, host, batches, num_steps=600, listener=record_host)
grown = ef.runtime.fit(
    growth,
    loss_fn,
    optimizer,
    host,
    batches,
    num_steps=600,
    key=jax.random.key(0),
    survey_batch=held_out,
    listener=record_grown,
)
folder.finish({"steps": 600, "seeds_total": growth.layout.num_seeds, "task": data.task})
run = ef.report.read(folder.path)
print(f"programs compiled after the first segment: {grown.num_compiled}")

# %% [markdown]
# The life of every seed that woke up. Each row is a seed, each colour a stage. Up to the day it is
# fossilized, an adapter can be taken out again.

# %%
ef.report.figures.stage_map(run)

# %% [markdown]
# The training loss, and the accuracy on the test digits. "Host alone" is the same host, simply
# trained on. The marks below say when seeds germinated,
# were grafted, and were kept.

# %%
ef.report.figures.loss_curves(run)

# %%
ef.report.figures.accuracy_curves(run)

# %% [markdown]
# `ef.report.write_report(folder.path)` puts these pictures and more into one HTML page.
#
# ## 4. Asking by hand
#
# A policy is only one way to ask; you are another. Commands are arrays of a fixed size that enter
# the same compiled step. We go on with the network of section 2 and ask for an adapter where the
# survey saw little to gain.

# %%
seed = growth.layout.seed_index("hidden", chunk=0)
germinate = growth.commands([ef.commands.germinate(seed, "units")])

params, state, opt_state, infos = train(params, state, opt_state, order[:20], germinate)
print(ef.commands.Code(int(infos.outcomes.code[0, 0])).name)
growth.seed(state, seed)

# %% [markdown]
# It acts already, and until the loss has settled it is not judged. We think better of it and ask to
# cull it at once. This is refused, and a refusal is an answer with a code: no exception inside the
# step, and no silence either.

# %%
cull = growth.commands([ef.commands.cull(seed)])


def ask(command):
    global params, state, opt_state
    params, state, opt_state, infos = train(params, state, opt_state, order[:1], command)
    outcome = jax.tree.map(lambda rows: int(rows[0, 0]), infos.outcomes)
    print(
        f"{ef.commands.Code(outcome.code).name:18}",
        f"{ef.Stage(outcome.before).name} -> {ef.Stage(outcome.after).name}",
    )


ask(cull)

# %% [markdown]
# **Tuning a gate.** The thresholds between the stages are arrays in the state as well, so they can
# be replaced while everything runs. By default an adapter waits 20 to 150 steps for the loss to
# settle; from here on, 5 to 10. Then it is on trial, and may be culled. Asking for another one in
# its place is refused again: a culled seed rests for a while before it may germinate.

# %%
stay = ef.Stage.STABILIZATION
hasty = ef.lifecycle.settings(min_steps={stay: 5}, max_steps={stay: 10})

with ef.runtime.count_compilations() as count:
    state = state._replace(settings=hasty)
    params, state, opt_state, infos = train(params, state, opt_state, order[:5])
    for command in (cull, germinate):
        ask(command)
print(f"programs compiled: {count.num_compiled}")

# %% [markdown]
# ## 5. What is it worth? An honest comparison
#
# `esper_fn.demo.jobs` runs five ways to spend the same steps on the same data: the host alone, the host
# that grows where the survey says, evenly in every layer, or at random places, and a static network
# without a narrow place and with as many parameters as the grown one. This job's host has two units
# in the middle; everything starts from scratch, and growth is that of the defaults.

# %%
job = jobs.job("digits")
comparison = jobs.prepare(job, data, steps=600)
rows = [jobs.run(comparison, seed) for seed in range(4)]
summary = jobs.summary(comparison, rows)
ef.report.figures.baseline_bars(ef.report.Run(summary=summary, events=[], metrics=[]))

# %% [markdown]
# Read all the bars. Growth repairs the host, nearly to the accuracy of the network that was well
# shaped from the start. Chance now and then hits the right place too, and often does not. Growing
# evenly in every layer comes close here, as a job of four adapters has room for one in the narrow
# layer; four repeats are too few to tell the two apart. So **growth is for a network you are given
# (pretrained, frozen, too long to train again, or of a size nobody knows in advance), and not a way
# to beat a network whose size you can simply choose.**
#
# Next: `esper grow --data digits` runs the full-length job and writes its report.
