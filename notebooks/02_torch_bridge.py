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
# # Growing a PyTorch model that you already have
#
# Your model is an `nn.Module` and your loop is your own. `torch_bridge.grow` puts *seeds* after
# some of the model's modules; one line in the loop, `bridge.step(loss)`, lets them live. While
# nothing grows, outputs and gradients are those of the bare model, bit for bit.
#
# Two models: a small convolutional network on Fashion-MNIST in a plain loop, and a sized-down GPT-2
# of `transformers`, randomly initialised, on tiny Shakespeare, in the Hugging Face `Trainer`. It
# runs on a laptop CPU in a minute or two.

# %%
# %matplotlib inline
# %config InlineBackend.figure_formats = ["retina"]
import copy
import os
import pydoc_data.topics
import tempfile
import warnings
from pathlib import Path

warnings.filterwarnings("ignore", message="IProgress not found")  # of tqdm, without ipywidgets
os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here is downloaded

import jax
import matplotlib.pyplot as plt
import numpy as np
import torch
import transformers
from torch import nn
from torch.nn.functional import cross_entropy

import esper_fn as ef
import torch_bridge
from esper_fn import report
from esper_fn.demo.data import batch_indices, load
from torch_bridge.transformers import GrowthCallback

transformers.logging.set_verbosity_error()
torch.set_num_threads(1)  # models this small gain nothing from more
_ = torch.manual_seed(0)

# %% [markdown]
# ## 1. A convolutional network
#
# The data are never downloaded: put the published files of Fashion-MNIST where `$ESPER_DATA`
# points. Without them this notebook goes on with scikit-learn's 8 x 8 digits, and says so.

# %%
try:
    data = load("fashion-mnist")
except ef.errors.MissingDataError:
    data = load("digits")
side = int(np.prod(data.input_shape) ** 0.5)


def images(inputs):
    return torch.tensor(inputs).reshape(-1, 1, side, side)


train_x, train_y = images(data.train_inputs), torch.tensor(data.train_targets).long()
test_x, test_y = images(data.test_inputs[:2000]), torch.tensor(data.test_targets[:2000]).long()
held_x = images(data.validation_inputs[:256])
held_y = torch.tensor(data.validation_targets[:256]).long()
print(f"{data.name}: {len(train_x):,} images of {side} x {side}")

# %% [markdown]
# The model and the loop are plain PyTorch. We train the model for a while and from then on treat it
# like a pretrained one: it is the **host**.


# %%
class SmallNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.hidden = nn.Linear(16 * 16, 32)
        self.out = nn.Linear(32, 10)

    def forward(self, x):
        x = torch.relu(self.conv2(torch.relu(self.conv1(x))))
        x = nn.functional.adaptive_avg_pool2d(x, 4).flatten(1)
        return self.out(torch.relu(self.hidden(x)))


def batches(num_steps, seed):
    return batch_indices(
        data.train_inputs, data.train_targets, batch_size=64, num_steps=num_steps, seed=seed
    )


def accuracy(model):
    with torch.no_grad():
        return float((model(test_x).argmax(-1) == test_y).float().mean())


host = SmallNet()
optimizer = torch.optim.AdamW(host.parameters(), lr=3e-3)
for rows in batches(num_steps=300, seed=0):
    loss = cross_entropy(host(train_x[rows]), train_y[rows])
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
print(f"after 300 steps: {accuracy(host):.1%} of the test images are right")

# %% [markdown]
# **Where, what, when.** `targets` names modules as PEFT does: by names or ends of names, patterns or
# classes. The output of each is cut into chunks along its features (the channels of a convolution),
# and each chunk has a seed. `blueprints` says what may grow there, and the policy says when. Make
# the optimiser afterwards: adapters are parameters of the model.

# %%
model = copy.deepcopy(host)
bridge = torch_bridge.grow(
    model,
    targets=["conv1", "conv2", "hidden"],
    chunks={"conv1": 2, "conv2": 4, "hidden": 4},
    blueprints={"mix": ef.blueprints.low_rank(rank=4)},
    capacity=4,
    policy=ef.policies.periodic(every=30),
    graft=ef.grafting.linear(num_steps=50),
)

same = torch.equal(model(test_x), host(test_x))
print("bit for bit the host's output while nothing lives:", same)

# %% [markdown]
# **Train.** The loop has one line more than the one above, and every 25 steps a survey on held-out
# images: where would growth pay, and what are the live adapters worth?

# %%
infos, losses = [], []
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for i, rows in enumerate(batches(num_steps=400, seed=1)):
    loss = cross_entropy(model(train_x[rows]), train_y[rows])
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    infos.append(bridge.step(loss))
    losses.append(loss.item())
    if i % 25 == 0:
        bridge.survey(lambda: cross_entropy(model(held_x), held_y))

trained_on = copy.deepcopy(host)
optimizer = torch.optim.AdamW(trained_on.parameters(), lr=3e-3)
for rows in batches(num_steps=400, seed=1):
    cross_entropy(trained_on(train_x[rows]), train_y[rows]).backward()
    optimizer.step()
    optimizer.zero_grad()

print(f"host, 400 more steps: {accuracy(trained_on):.1%}")
print(f"grown, the same steps: {accuracy(model):.1%}, {bridge.num_live} adapters at work")

# %% [markdown]
# One run is an anecdote; `esper grow` compares with repeats and rivals. What happened to each seed
# is recorded in the same form as in JAX, so the same figures show it.


# %%
def record(name, bridge, infos, losses):
    folder = report.create(Path(tempfile.mkdtemp()) / name)
    for first in range(0, len(losses), 10):
        part = jax.tree.map(lambda *each: np.stack(each), *infos[first : first + 10])
        segment = ef.runtime.Segment(
            first_step=first,
            num_steps=10,
            state=None,
            losses=np.array(losses[first : first + 10]),
            infos=part,
            events=ef.runtime.lifecycle_events(bridge.growth, part, first_step=first),
            rollbacks=[],
        )
        folder.record(segment)
    folder.finish({"steps": len(losses), "seeds_total": bridge.growth.layout.num_seeds})
    return report.read(folder.path)


run = record("fashion", bridge, infos, losses)
report.figures.stage_map(run)

# %%
report.figures.alpha_curves(run)

# %% [markdown]
# **Unwrap.** `unwrap` removes seeds and hooks. Adapters that are linear in the output of a
# linear layer or a convolution are folded into its weights, as all are here, so inference costs
# nothing more; others would stay as plain submodules named `grown`. The result can be exported.

# %%
with torch.no_grad():
    before = model(test_x)
    plain = bridge.unwrap()
    after = plain(test_x)
print(f"largest change of any output: {float((before - after).abs().max()):.1e}")
print("parameters:", sum(p.numel() for p in plain.parameters()), "as the host's:", end=" ")
print(sum(p.numel() for p in host.parameters()))

exported = torch.export.export(plain, (test_x[:4],))
print("torch.export agrees:", torch.allclose(exported.module()(test_x[:4]), plain(test_x[:4])))

# %% [markdown]
# ## 2. GPT-2, in the Hugging Face Trainer
#
# Two layers, 64 wide, initialised at random. The text is tiny Shakespeare if `$ESPER_DATA` has it,
# or else Python's own help pages, which every Python brings along.

# %%
CONTEXT = 32
try:
    text_data = load("shakespeare", context_length=CONTEXT)
    windows, validation = text_data.train_inputs, text_data.validation_inputs
    num_characters = text_data.num_classes
    print("tiny Shakespeare")
except ef.errors.MissingDataError:
    text = "\n".join(pydoc_data.topics.topics.values())
    characters = sorted(set(text))
    ids = np.array([characters.index(c) for c in text[: 400 * CONTEXT * 4]], np.int32)
    windows, validation = np.split(ids.reshape(-1, CONTEXT), [1500])
    num_characters = len(characters)
    print("Python's help pages")

rows = torch.tensor(np.array(windows[:4_000])).long()
held_rows = torch.tensor(np.array(validation[:32])).long()
texts = [{"input_ids": row, "labels": row} for row in rows]


def gpt2():
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=num_characters,
            n_positions=CONTEXT,
            n_embd=64,
            n_layer=2,
            n_head=4,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


# %% [markdown]
# A block of a transformer is a target too, even if it returns a tuple: `blocks("h")` is every block
# of the list `h`. Their class does not tell their width, so we pass it. The `Trainer` calls the
# bridge through a callback.

# %%
language_model = gpt2()
every_block = torch_bridge.blocks("h")
language_bridge = torch_bridge.grow(
    language_model,
    targets=every_block,
    features={every_block: 64},
    chunks=4,
    blueprints={"units": ef.blueprints.bottleneck(width=32)},
    capacity=4,
    policy=ef.policies.periodic(every=20),
    graft=ef.grafting.linear(num_steps=50),
)


class Recorder(transformers.TrainerCallback):
    """Keeps what the growth callback measures; it runs after it."""

    def __init__(self, growth):
        self.growth, self.infos, self.losses = growth, [], []

    def on_step_end(self, args, state, control, **kwargs):
        self.infos.append(self.growth.last_info)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.losses.append(float(logs["loss"]))


trainer = transformers.Trainer(
    language_model,
    transformers.TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        max_steps=240,
        per_device_train_batch_size=8,
        learning_rate=3e-3,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
    ),
    train_dataset=texts,
)
trainer.remove_callback(transformers.PrinterCallback)
growth = GrowthCallback(
    language_bridge,
    survey=lambda: language_model(held_rows, labels=held_rows).loss,
    survey_every=30,
).attach(trainer)
recorder = Recorder(growth)
trainer.add_callback(recorder)
_ = trainer.train()

with torch.no_grad():
    held_loss = float(language_model(held_rows, labels=held_rows).loss)
print(f"held-out loss {held_loss:.2f}, {language_bridge.num_live} adapters at work")

# %% [markdown]
# Which block grows, and when:

# %%
language_run = record("gpt2", language_bridge, recorder.infos, recorder.losses)
report.figures.stage_map(language_run)

# %%
fig, axes = plt.subplots(figsize=(7, 2.8), layout="constrained")
smooth = np.convolve(recorder.losses, np.ones(10) / 10, mode="valid")
axes.plot(np.arange(len(smooth)) + 10, smooth, color="#0b6fb8")
axes.spines[["top", "right"]].set_visible(False)
axes.set_xlabel("step")
axes.set_title("Training loss, mean of ten steps", loc="left")
plt.show()

# %% [markdown]
# **Save and load.** A checkpoint is an ordinary state dict: the lifecycle is one tensor in it. A
# model that is grown alike and loads it has its seeds in the same stages, and
# `train(resume_from_checkpoint=...)` just works.

# %%
again = gpt2()
again_bridge = torch_bridge.grow(
    again,
    targets=every_block,
    features={every_block: 64},
    chunks=4,
    blueprints={"units": ef.blueprints.bottleneck(width=32)},
    capacity=4,
    policy=ef.policies.periodic(every=20),
    graft=ef.grafting.linear(num_steps=50),
    verbose=False,
)
again.load_state_dict(language_model.state_dict())
print("the same stages:", again_bridge.stages.tolist() == language_bridge.stages.tolist())
with torch.no_grad():
    same = torch.equal(again(held_rows).logits, language_model(held_rows).logits)
print("the same output, bit for bit:", same)

# %% [markdown]
# ## 3. JAX functions in torch
#
# `to_torch` turns a jitted JAX function into one that torch calls and differentiates, here Huber's
# loss from Optax:

# %%
import optax

huber = torch_bridge.to_torch(jax.jit(optax.losses.huber_loss))
x = torch.linspace(-3, 3, 101, requires_grad=True)
(slope,) = torch.autograd.grad(huber(x).sum(), x)

fig, axes = plt.subplots(figsize=(7, 2.4), layout="constrained")
axes.plot(x.detach(), huber(x).detach(), color="#0b6fb8", label="loss")
axes.plot(x.detach(), slope, color="#d1495b", label="its slope, by torch's autograd")
axes.spines[["top", "right"]].set_visible(False)
axes.legend(frameon=False)
plt.show()
