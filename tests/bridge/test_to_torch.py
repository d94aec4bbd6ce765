"""JAX functions called, differentiated and compiled from torch."""

import copy
import functools
import gc
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest

torch = pytest.importorskip("torch")

from torch_bridge import BridgeError, to_torch  # noqa: E402


def in_jax(params, x, scale=1.0):
    hidden = jnp.tanh(x @ params["w"] + params["b"])
    return {"y": hidden * scale, "best": jnp.argmax(hidden), "x": x}


def in_torch(w, b, x, scale=1.0):
    return torch.tanh(x @ w + b) * scale


@pytest.fixture
def leaves():
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0))
    return [draw(shape).requires_grad_() for shape in ((4, 5), (5,), (3, 4))]


def y_of(function, scale=2.0):
    return lambda w, b, x: function({"w": w, "b": b}, x, scale=scale)["y"]


def assert_close(ours, theirs):
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=0, atol=1e-5 * float(their.abs().max()))


def test_values_and_containers(leaves):
    w, b, x = leaves
    out = to_torch(in_jax)({"w": w, "b": b}, x, scale=3.0)
    assert list(out) == ["best", "x", "y"]
    assert out["best"].dtype == torch.int32
    assert not out["best"].requires_grad
    torch.testing.assert_close(out["x"], x)
    torch.testing.assert_close(out["y"], in_torch(w, b, x, 3.0))
    assert int(out["best"]) == int(in_torch(w, b, x).argmax())


def test_first_derivatives(leaves):
    function = y_of(to_torch(in_jax))
    weights = torch.arange(15.0).reshape(3, 5)
    ours = torch.autograd.grad((function(*leaves) * weights).sum(), leaves)
    theirs = torch.autograd.grad((in_torch(*leaves, 2.0) * weights).sum(), leaves)
    assert_close(ours, theirs)


def third(function, leaves):
    """The gradient of a penalty on the gradient of a penalty on the gradient."""
    first = torch.autograd.grad(function(*leaves).pow(2).sum(), leaves, create_graph=True)
    second = torch.autograd.grad(sum(g.pow(2).sum() for g in first), leaves, create_graph=True)
    return torch.autograd.grad(sum(g.pow(3).sum() for g in second), leaves)


def test_third_derivatives(leaves):
    ours = third(y_of(to_torch(in_jax)), leaves)
    theirs = third(lambda *args: in_torch(*args, 2.0), [t.double() for t in leaves])
    for our, their in zip(ours, theirs, strict=True):
        assert float((our - their).abs().max() / their.abs().max()) < 1e-5


def test_gradcheck_to_the_second_order():
    with jax.enable_x64(True):
        function = to_torch(lambda x, y: (jnp.sin(x) * y, jnp.exp(x).sum()))
        args = [torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
        assert torch.autograd.gradcheck(function, args)
        assert torch.autograd.gradgradcheck(function, args)


def test_only_what_needs_a_gradient_gets_one(leaves):
    w, b, x = leaves
    function = to_torch(in_jax)
    out = function({"w": w, "b": b.detach()}, x.detach())
    out["y"].sum().backward()
    assert w.grad is not None
    assert b.grad is None
    with torch.no_grad():
        assert not function({"w": w, "b": b}, x)["y"].requires_grad


def test_an_output_that_is_not_used_costs_no_gradient():
    function = to_torch(lambda x: (jnp.sin(x), jnp.cos(x), x > 0))
    x = torch.tensor([0.3, -0.2], requires_grad=True)
    (grad,) = torch.autograd.grad(function(x)[1].sum(), x)
    torch.testing.assert_close(grad, -x.sin())


def test_one_tensor_given_twice(leaves):
    x = leaves[2]
    function = to_torch(lambda a, b: a * b)
    (grad,) = torch.autograd.grad(function(x, x).sum(), x)
    torch.testing.assert_close(grad, 2 * x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    x = torch.randn(8, dtype=dtype, requires_grad=True)
    y = to_torch(lambda x: x * 2)(x)
    assert y.dtype == dtype
    y.backward(torch.ones_like(y))
    assert x.grad.dtype == dtype
    assert set(x.grad.tolist()) == {2.0}


def test_plain_numbers_are_weakly_typed_and_never_retrace():
    function = to_torch(lambda x, k: x * k)
    x = torch.ones(3, dtype=torch.bfloat16)
    assert function(x, 2.5).dtype == torch.bfloat16
    assert function(x, 3.0).tolist() == [3.0] * 3
    assert function.num_traces == 1


def test_traced_once_a_signature():
    calls = []

    def adapter(x):
        calls.append(x.shape)
        return jnp.sin(x)

    function = to_torch(jax.jit(adapter))
    for size in (3, 5, 3, 5):
        x = torch.randn(size, requires_grad=True)
        for _ in range(3):
            function(x).sum().backward()
            function(x.detach())
    assert calls == [(3,), (5,)]
    assert function.num_traces == 2
    function(torch.ones(3, dtype=torch.int32))
    assert function.num_traces == 3


def test_static_arguments():
    def reduce(x, *, axis, how="sum"):
        return getattr(jnp, how)(x, axis=axis)

    function = to_torch(reduce, static_argnames=("axis", "how"))
    x = torch.arange(6.0).reshape(2, 3)
    assert function(x, axis=0).tolist() == [3.0, 5.0, 7.0]
    assert function(x, axis=1, how="max").tolist() == [2.0, 5.0]
    assert function.num_traces == 2
    with pytest.raises(BridgeError, match=r"'axis'.*list.*hashed"):
        function(x, axis=[0])
    with pytest.raises(BridgeError, match="static_argnames has axes; allowed: x, axis, how"):
        to_torch(reduce, static_argnames="axes")


def test_outputs_share_memory_with_nothing():
    constant = jnp.arange(64.0)
    function = to_torch(lambda x: (x, x, constant, constant, x + 1))
    x = torch.zeros(64)
    outs = function(x)
    assert len({x.data_ptr(), *(out.data_ptr() for out in outs)}) == 6
    for out in outs:
        out.fill_(9.0)
    assert float(x.sum()) == 0.0
    assert float(constant[1]) == 1.0
    assert function(x)[2].tolist() == list(range(64))


def test_changed_inputs_are_noticed_before_a_wrong_gradient():
    x = torch.ones(3, requires_grad=True)
    hidden = x * 2
    out = to_torch(jnp.sin)(hidden)
    hidden.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_no_inputs_and_empty_tensors():
    assert to_torch(lambda: jnp.arange(3))().tolist() == [0, 1, 2]
    x = torch.zeros((0, 3), requires_grad=True)
    y = to_torch(lambda x: x.sum(0))(x)
    y.sum().backward()
    assert x.grad.shape == (0, 3)


def test_arrays_and_keys_among_the_arguments():
    def noisy(key_data, x):
        return x + jax.random.normal(jax.random.wrap_key_data(key_data), x.shape)

    key = jax.random.key_data(jax.random.key(3))
    expected = jax.random.normal(jax.random.key(3), (4,))
    torch.testing.assert_close(to_torch(noisy)(key, torch.zeros(4)).tolist(), expected.tolist())
    with pytest.raises(BridgeError, match=r"argument 0 of noisy.*key_data"):
        to_torch(noisy)(jax.random.key(3), torch.zeros(4))


def test_functional_transforms(leaves):
    w, b, x = (leaf.detach() for leaf in leaves)
    ours, theirs = y_of(to_torch(in_jax)), lambda *args: in_torch(*args, 2.0)
    for function in (ours, theirs):
        function.grad = torch.func.grad(lambda w, f=function: f(w, b, x).pow(2).sum())
        function.second = torch.func.grad(lambda w, f=function: f.grad(w).pow(2).sum())
    assert_close([ours.grad(w), ours.second(w)], [theirs.grad(w), theirs.second(w)])


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's own
def test_vmap_and_forward_mode_are_refused(leaves):
    w, b, x = leaves
    function = y_of(to_torch(in_jax))
    for inputs in (x, x.detach()):
        with pytest.raises(BridgeError, match=r"torch.vmap.*'in_jax'.*jax.vmap"):
            torch.func.vmap(lambda row: function(w.detach(), b.detach(), row[None]))(inputs)
    with pytest.raises(BridgeError, match="forward-mode"):
        torch.func.jvp(lambda x: function(w, b, x), (x,), (x,))


class Unknown:
    pass


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("a",), "argument 0 of f is a str.*static_argnames"),
        ((torch.ones(2), {"k": Unknown()}), r"argument 1\['k'\] of f is a Unknown"),
        ((torch.ones(2, dtype=torch.float64),), "argument 0 of f has the dtype torch.float64"),
        ((torch.ones(2, 2).to_sparse(),), "argument 0 of f is sparse"),
        ((torch.tensor([2**40]),), "values from"),
    ],
)
def test_bad_arguments_are_named(args, message):
    def f(*args):
        return args[0]

    with pytest.raises(BridgeError, match=message):
        to_torch(f)(*args)


def test_bad_functions_are_named():
    with pytest.raises(BridgeError, match="fn is a Linear"):
        to_torch(torch.nn.Linear(2, 2))
    with pytest.raises(BridgeError, match="fn is a int"):
        to_torch(3)
    with pytest.raises(BridgeError, match="random key"):
        to_torch(lambda x: jax.random.key(0))(torch.ones(1))


class Pair(NamedTuple):
    first: object
    second: object


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_without_a_graph_break(backend, leaves):
    torch.compiler.reset()
    function = to_torch(in_jax)

    def loss(function, w, b, x):
        return (function(w * 2, b, x) + 1).pow(2).sum()

    compiled = torch.compile(
        functools.partial(loss, y_of(function)), fullgraph=True, backend=backend
    )
    expected = loss(lambda *args: in_torch(*args, 2.0), *leaves)
    for _ in range(2):
        value = compiled(*leaves)
        torch.testing.assert_close(value, expected)
        ours = torch.autograd.grad(value, leaves)
    assert_close(ours, torch.autograd.grad(expected, leaves))
    assert function.num_traces == 1


def test_compiles_with_named_tuples_in_and_static_arguments():
    torch.compiler.reset()

    def f(pair, *, how):
        return {"out": [getattr(jnp, how)(pair.first, pair.second)]}

    function = to_torch(f, static_argnames="how")
    compiled = torch.compile(
        lambda x: function(Pair(first=x, second=x + 1), how="add")["out"][0] * 2,
        fullgraph=True,
        backend="eager",
    )
    assert compiled(torch.ones(2)).tolist() == [6.0, 6.0]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # torch's own
def test_inductor_compiles_it(leaves):
    torch.compiler.reset()
    function = y_of(to_torch(in_jax))
    compiled = torch.compile(lambda w, b, x: function(w * 2, b, x).sum(), fullgraph=True)
    value = compiled(*leaves)
    w, b, x = leaves
    expected = in_torch(w * 2, b, x, 2.0).sum()
    torch.testing.assert_close(value, expected)
    assert_close(torch.autograd.grad(value, leaves), torch.autograd.grad(expected, leaves))


def test_a_graph_whose_function_is_gone_says_so():
    torch.compiler.reset()
    saved = {}

    def backend(graph, inputs):
        saved["graph"] = graph
        return graph.forward

    function = to_torch(lambda x: x + 1)
    torch.compile(function, fullgraph=True, backend=backend)(torch.ones(2))
    x = torch.ones(2)
    assert saved["graph"](x)[0].tolist() == [2.0, 2.0]
    torch.compiler.reset()
    del function
    gc.collect()
    with pytest.raises(BridgeError, match="keep the result of"):
        torch.ops.torch_bridge.jax_program("f:0", [x], torch.device("cpu"))


@pytest.mark.parametrize("is_dynamic", [None, True])
def test_other_shapes_under_torch_compile(is_dynamic):
    torch.compiler.reset()
    function = to_torch(jnp.sin)
    compiled = torch.compile(
        lambda x: function(x).sum(), fullgraph=True, backend="aot_eager", dynamic=is_dynamic
    )
    for size in (3, 5, 8, 3):
        x = torch.randn(size, requires_grad=True)
        (grad,) = torch.autograd.grad(compiled(x), x)
        torch.testing.assert_close(grad, x.detach().cos())
    assert function.num_traces == 3


def test_a_module_that_holds_one_is_checkpointed_and_copied():
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(3, 3)
            self.activation = to_torch(jax.nn.silu)

        def forward(self, x):
            return self.activation(self.linear(x))

    layer = Layer()
    other = copy.deepcopy(layer)
    assert other.linear.weight is not layer.linear.weight
    x = torch.randn(2, 3)
    torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False).sum().backward()
    torch.nn.functional.silu(other.linear(x)).sum().backward()
    torch.testing.assert_close(layer.linear.weight.grad, other.linear.weight.grad)
