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
# You have a network that is too small in one layer. You do not know which one, nor how much is
# missing, and you would rather not start again. *Growth* means: while the network trains, small
# new networks germinate in it where a measurement promises most. They learn together with it, are
# measured, and are removed where they do not help.
#
# This notebook takes a plain training loop, adds growth to it line by line, looks at what happens,
# steers it by hand, and ends with a comparison. It takes two or three minutes on a laptop CPU,
# most of which XLA spends compiling.

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
from esper_fn import report
from esper_fn.demo import jobs
from esper_fn.demo.data import batch_indices, load

# %% [markdown]
# ## 1. A plain loop, and a network that is too narrow
#
# The data are scikit-learn's 8 x 8 digits: 1200 to train on, 237 to validate, 360 to test. One of
# the network's four layers is a mistake: everything has to pass through **one single unit**.

# %%
data = load("digits")
train_x, train_y = data.train_inputs, data.train_targets
test_x, test_y = data.test_inputs, data.test_targets
held_out = data.validation_inputs, data.validation_targets


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
# The loop is the usual one, with `jax.jit` and Optax.

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
# A network of this kind without the mistake reaches about 97 %. From here on we treat this one like
# a pretrained network and call it the **host**.
#
# ## 2. The same loop, growing
#
# **Where.** One `ef.flax.nnx.Grow` line marks a **site**. A site splits its features into chunks, and
# each chunk gets a **seed**, where something may grow. With `source=`, what grows reads one
# activation and writes into a later one; around the narrow layer this gives the layer more units.
# We mark three sites and do not say which one is the mistake.


# %%
class GrowingClassifier(Classifier):
    def __init__(self, rngs):
        super().__init__(rngs)
        self.grow_hidden = ef.flax.nnx.Grow("hidden", chunks=4)
        self.grow_middle = ef.flax.nnx.Grow("middle", chunks=2)
        self.grow_late = ef.flax.nnx.Grow("late", chunks=4)

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
# and the capacity for **adapters** (networks made from a blueprint), which sets the memory.
#
# **When.** A policy asks for growth. The default one asks in the first step, wherever a survey (see
# below) promises at least a third of the best, and again every hundred steps as long as it pays.

# %%
sites = ef.discover_sites(growing, train_x[:1])
growth = ef.Growth(
    sites=sites,
    blueprints={"units": ef.blueprints.bottleneck(width=8, activation="gelu")},
    capacity=2,
    adapters_at_once=None,  # one compiled variant: small adapters cost little anyway
)
optimizer = ef.optim.per_adapter(adam)  # the host's Adam, and one of its own for every adapter

for site in sites:
    print(f"{site.name:7} {site.chunks} seeds over {site.features} features")

# %% [markdown]
# **The step.** The loss function gets `seeds` as a second argument and puts them in scope around
# the model. Seeds, adapters, policy and random keys are one pytree, `state`, like the optimiser's.


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
# how much an adapter at each seed could help (its *potential*). For adapters on trial it also
# measures by how much the loss would rise without them (their *contribution*). The first survey
# already finds the mistake:

# %%
state = growth.init(jax.random.key(0))
state, measured = survey(host, state, held_out)

labels = [f"{site.name} {chunk}" for site in sites for chunk in range(site.chunks)]
fig, axes = plt.subplots(figsize=(7, 2.8), layout="constrained")
axes.barh(labels[::-1], measured.potential[::-1], color="#0b6fb8", height=0.7)
axes.spines[["top", "right", "left"]].set_visible(False)
axes.set(xlabel="growth potential", title="What each seed could gain")
plt.show()

# %% [markdown]
# **Train.** The loop has one new line, the survey. Once every program is compiled, we count what
# XLA still compiles.

# %%
nothing = growth.commands()


def train(params, state, opt_state, order, commands=nothing):
    infos = []
    for i, rows in enumerate(order):
        if i % 25 == 0:
            state, _ = survey(params, state, held_out)
        batch = (train_x[rows], train_y[rows])
        now = commands if i == 0 else nothing
        params, state, opt_state, info = step(params, state, opt_state, batch, now)
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
# Adapters germinated, were grafted, measured and kept, and nothing was compiled again: whether a
# seed sleeps or acts is data, not structure.
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
# | fossilized | is kept for good and learns on with the host |
# | culled | is removed, where it did not help |
#
# An adapter that acts gets its exact gradient, as if it had been part of the network from the
# start. A cause says who moved the seed: a rule of the policy, a command, the gate that opened
# last, or the dwell limit, because no stage may last for ever. A seed can be read at any time:

# %%
growth.seed(state, growth.layout.seed_index("middle", chunk=0))

# %% [markdown]
# ## 3. The ready loop, with pictures
#
# `ef.runtime.fit` is the loop above with many steps in one `lax.scan`, snapshots and roll-back when
# the loss diverges, and a listener between segments. `fit_host` trains the same host on the same
# batches without growth: growing has to beat *simply training on*. The listener of each records its
# segments in a run folder, from which the pictures are drawn.

# %%
batches = ef.runtime.array_batches(train_x, train_y, batch_size=64, num_steps=600, seed=1)
folder = report.create(Path(tempfile.mkdtemp()) / "quickstart")
host_size = sum(leaf.size for leaf in jax.tree.leaves(host))


def record_host(segment):
    score = accuracy(segment.state, ef.NoSeeds())
    folder.record(segment, arm="host", host_parameters=host_size, test_accuracy=score)


def record_grown(segment):
    score = accuracy(segment.state.params, growth.seeds(segment.state.growth_state))
    folder.record(segment, host_parameters=host_size, test_accuracy=score)


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
run = report.read(folder.path)
print(f"programs compiled after the first segment: {grown.num_compiled}")

# %% [markdown]
# The life of every seed that left DORMANT. Each row is a seed, each colour a stage. Until it is
# fossilized, an adapter can be removed again.

# %%
report.figures.stage_map(run)

# %% [markdown]
# The training loss, and the accuracy on the test digits. "Host alone" is the same host, trained on
# without growth. The marks below say when seeds germinated, were grafted, and were kept.

# %%
report.figures.loss_curves(run)

# %%
report.figures.accuracy_curves(run)

# %% [markdown]
# `report.write_report(folder.path)` puts these pictures and more into one HTML page.
#
# ## 4. Commands by hand
#
# A policy is only one way to ask for growth; you can ask too. Commands are arrays of a fixed size
# that enter the same compiled step. We go on with the network of section 2 and ask for an adapter
# where the survey saw little to gain.

# %%
seed = growth.layout.seed_index("hidden", chunk=0)
germinate = growth.commands([ef.commands.germinate(seed, "units")])

params, state, opt_state, infos = train(params, state, opt_state, order[:20], germinate)
print(ef.commands.Code(int(infos.outcomes.code[0, 0])).name)
growth.seed(state, seed)

# %% [markdown]
# Until the loss has settled it is not judged: a request to cull it at once is refused with a code.

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
# **Tuning a gate.** The thresholds between the stages are arrays in the state, so they can be
# replaced while everything runs. By default an adapter waits 20 to 150 steps for the loss to
# settle; from here on, 5 to 10. Then it is on trial, and may be culled. Asking for another one there
# is refused again: a culled seed rests for a while before it may germinate.

# %%
stay = ef.Stage.STABILIZATION
hasty = ef.lifecycle.settings(min_steps={stay: 5}, max_steps={stay: 10})

with ef.runtime.count_compilations() as count:
    state = state._replace(settings=hasty)
    params, state, opt_state, infos = train(params, state, opt_state, order[:5])
    ask(cull)
    ask(germinate)
print(f"programs compiled: {count.num_compiled}")

# %% [markdown]
# ## 5. What is it worth? A comparison
#
# `esper_fn.demo.jobs` spends the same steps on the same data in five ways: the host alone, the host
# that grows where the survey says, evenly in every layer, or at random sites, and a static network
# without a narrow layer that has as many parameters as the grown one. The host of this job has two
# units in the middle, everything starts from scratch, and growth has its defaults.

# %%
job = jobs.get("digits")
comparison = jobs.prepare(job, data, steps=600)
rows = [jobs.run(comparison, seed) for seed in range(4)]
summary = jobs.summarize(comparison, rows)
report.figures.baseline_bars(report.Run(summary=summary, events=[], metrics=[]))

# %% [markdown]
# Read all the bars. Growth repairs the host, nearly to the accuracy of the network that was well
# shaped from the start. Chance now and then hits the right layer too, and often does not. Growing
# evenly comes close here, as a job of four adapters has room for one in the narrow layer; four
# repeats are too few to tell the two apart. So **growth is for a network that you have (pretrained,
# frozen, too long to train again, or of a size nobody knows in advance), and not a way to beat a
# network whose size you can simply choose.**
#
# Next: `esper grow --data digits` runs the full-length job and writes its report.
