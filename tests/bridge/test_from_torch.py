"""Torch modules and functions under JAX's transformations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from torch_bridge import BridgeError, from_torch, to_torch, tree_to_jax, tree_to_torch  # noqa: E402


@pytest.fixture(scope="module")
def module():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(0), (3, 4))


def reference(params, x):
    hidden = jnp.tanh(x @ params["0.weight"].T + params["0.bias"])
    return hidden @ params["2.weight"].T + params["2.bias"]


def close(ours, theirs):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), ours, theirs)


def test_values_in_and_out_of_jit(module, x):
    apply, params = from_torch(module)
    assert sorted(params) == ["0.bias", "0.weight", "2.bias", "2.weight"]
    expected = tree_to_jax(module(tree_to_torch(x)))
    close(apply(params, x), expected)
    close(jax.jit(apply)(params, x), expected)


def test_parameters_are_a_copy(x):
    module = nn.Linear(4, 2)
    apply, params = from_torch(module)
    before = apply(params, x)
    with torch.no_grad():
        module.weight.zero_()
    np.testing.assert_array_equal(before, apply(params, x))
    assert float(abs(params["weight"]).sum()) > 0


def penalty(apply, params, x):
    grads = jax.grad(lambda p, x: (apply(p, x) ** 2).sum(), argnums=(0, 1))(params, x)
    return sum((leaf**2).sum() for leaf in jax.tree.leaves(grads))


def test_derivatives_of_two_orders(module, x):
    apply, params = from_torch(module)
    ours = jax.jit(jax.grad(lambda p: (apply(p, x) ** 3).sum()))(params)
    close(ours, jax.grad(lambda p: (reference(p, x) ** 3).sum())(params))
    ours = jax.jit(jax.grad(lambda p, x: penalty(apply, p, x), argnums=(0, 1)))(params, x)
    theirs = jax.grad(lambda p, x: penalty(reference, p, x), argnums=(0, 1))(params, x)
    close(ours, theirs)


def test_vmap_calls_one_by_one(module, x):
    apply, params = from_torch(module)
    close(jax.vmap(lambda row: apply(params, row))(x), reference(params, x))
    grad = jax.grad(lambda row: apply(params, row).sum())
    close(
        jax.jit(jax.vmap(grad))(x), jax.vmap(jax.grad(lambda row: reference(params, row).sum()))(x)
    )


def test_scan_and_remat(module, x):
    apply, params = from_torch(module)

    def total(apply, params):
        def adapter(carry, row):
            return carry + jax.checkpoint(apply)(params, row).sum(), None

        return jax.lax.scan(adapter, jnp.float32(0), x)[0]

    close(
        jax.jit(jax.grad(lambda p: total(apply, p)))(params),
        jax.grad(lambda p: total(reference, p))(params),
    )


def test_functions_with_integers_structure_and_options(x):
    def f(batch, *, scale, label=None):
        return {"best": batch["x"].argmax(-1), "half": (batch["x"] * scale).bfloat16()}, label

    function = from_torch(f)
    (out, label) = function({"x": x}, scale=2)
    assert label is None
    assert out["best"].dtype == jnp.int32
    assert out["half"].dtype == jnp.bfloat16
    close(out["best"], x.argmax(-1))
    np.testing.assert_array_equal(out["half"], (x * 2).astype(jnp.bfloat16))
    grad = jax.grad(lambda x: function({"x": x}, scale=2.0)[0]["half"].astype(jnp.float32).sum())
    close(grad(x), jnp.full_like(x, 2.0))


def test_integer_inputs_have_no_gradient():
    table = nn.Embedding(7, 3)
    apply, params = from_torch(table)
    index = jnp.array([1, 1, 4])
    grads = jax.grad(lambda p: apply(p, index).sum())(params)
    assert grads["weight"].sum(1).tolist() == [0.0, 6.0, 0.0, 0.0, 3.0, 0.0, 0.0]


def test_tied_parameters_come_once():
    module = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Tanh(), nn.Linear(3, 3, bias=False))
    module[2].weight = module[0].weight
    apply, params = from_torch(module)
    assert list(params) == ["0.weight"]
    x = jnp.ones((1, 3))
    ours = jax.grad(lambda p: apply(p, x).sum())(params)["0.weight"]
    module(torch.ones(1, 3)).sum().backward()
    close(ours, tree_to_jax(module[0].weight.grad))


def test_unused_arguments_and_constant_results(x):
    function = from_torch(lambda x, y: (x * 2, torch.ones(2)))
    grads = jax.grad(lambda x, y: function(x, y)[0].sum(), argnums=(0, 1))(x, x)
    close(grads, (jnp.full_like(x, 2.0), jnp.zeros_like(x)))
    close(jax.grad(lambda x: function(x, x)[1].sum())(x), jnp.zeros_like(x))


def test_normalisation_and_dropout_in_eval_mode():
    torch.manual_seed(0)
    module = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.5)).eval()
    module[0].running_mean.normal_()
    apply, params = from_torch(module)
    x = jnp.arange(8.0).reshape(2, 4)
    expected = tree_to_jax(module(tree_to_torch(x, copy=True)))
    module[0].running_mean.zero_()  # buffers were copied when it was converted
    close(apply(params, x), expected)
    module.train()
    with pytest.raises(BridgeError, match="eval mode when it was converted"):
        apply(params, x)


OUTER = torch.zeros(3, 4)
IMPURE = {
    "dropout": (nn.Dropout(), r"draws random numbers.*\.eval\(\)"),
    "batch norm": (nn.BatchNorm1d(4), r"writes into a buffer.*\.eval\(\)"),
    "random": (lambda x: x + torch.randn(3, 4), "draws random numbers"),
    "outer": (OUTER.add_, "writes into a buffer or an outer tensor"),
    "outer out=": (lambda x: torch.add(x, x, out=OUTER), "writes into a buffer or an outer tensor"),
    "argument": (lambda x: x.mul_(2), "writes into its argument 0"),
    "branch": (lambda x: x if x.sum() > 0 else -x, "reads values in Python"),
    "mask": (lambda x: x[x > 0], "decides a shape"),
    "item": (lambda x: x * x.sum().item(), "reads values in Python"),
    "result": (lambda x: "text", "returns a str"),
    "float64": (lambda x: x.double(), "a result of .* has the dtype torch.float64"),
}


@pytest.mark.parametrize("kind", IMPURE)
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_what_is_not_pure_is_refused(kind, wrap, x):
    impure, message = IMPURE[kind]
    function = from_torch(impure)
    if isinstance(impure, nn.Module):
        apply, params = function
        function = lambda x: apply(params, x)  # noqa: E731
    with pytest.raises(BridgeError, match=message):
        wrap(function)(x)
    assert not OUTER.any()


def test_bad_arguments_are_named(module, x):
    apply, params = from_torch(module)
    with pytest.raises(BridgeError, match=r"lack 2\.bias; allowed"):
        apply({key: value for key, value in params.items() if key != "2.bias"}, x)
    with pytest.raises(BridgeError, match="have extra"):
        apply({**params, "extra": x}, x)
    with pytest.raises(BridgeError, match=r"torch tensor.*tree_to_jax"):
        apply(params, torch.ones(3, 4))
    with pytest.raises(BridgeError, match="module_or_fn is a int"):
        from_torch(3)
    with pytest.raises(BridgeError, match="random key"):
        from_torch(lambda k: k)(jax.random.key(0))


def test_jax_in_torch_in_jax_and_the_other_way_round(x):
    inner = to_torch(jnp.sin)
    function = from_torch(lambda x: inner(x) * 2)
    close(jax.jit(jax.grad(lambda x: function(x).sum()))(x), 2 * jnp.cos(x))

    outer = to_torch(from_torch(torch.sin))
    t = torch.arange(3.0, requires_grad=True)
    outer(t).sum().backward()
    torch.testing.assert_close(t.grad, t.detach().cos())
