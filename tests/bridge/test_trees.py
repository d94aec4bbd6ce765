"""Pytrees between torch and JAX: values, dtypes, shared memory, lifetime, refusals."""

import gc
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch_bridge import BridgeError, tree_to_jax, tree_to_torch  # noqa: E402

SAME = [
    "bool",
    "int8",
    "int16",
    "int32",
    "uint8",
    "uint16",
    "uint32",
    "bfloat16",
    "float16",
    "float32",
    "complex64",
    "float8_e4m3fn",
    "float8_e5m2",
]
SHAPES = [(), (5,), (3, 4), (0, 3), (2, 0), (1, 1, 1)]


def drawn(shape, dtype):
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3
    return (numbers > 0) if dtype == "bool" else numbers.abs().to(getattr(torch, dtype))


def as_bytes(value):
    if isinstance(value, torch.Tensor):
        return value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return np.ascontiguousarray(np.asarray(value)).tobytes()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", SAME)
def test_there_and_back_without_a_copy(dtype, shape):
    tensor = drawn(shape, dtype)
    array = tree_to_jax(tensor)
    back = tree_to_torch(array)
    assert isinstance(array, jax.Array)
    assert array.shape == shape
    assert array.dtype.name == dtype
    assert as_bytes(array) == as_bytes(tensor)
    assert back.dtype == tensor.dtype
    assert back.shape == tensor.shape
    assert as_bytes(back) == as_bytes(tensor)
    if tensor.numel():
        assert array.unsafe_buffer_pointer() == tensor.data_ptr() == back.data_ptr()


@pytest.mark.parametrize("dtype", SAME)
def test_numpy_to_torch(dtype):
    array = np.asarray(tree_to_jax(drawn((2, 3), dtype)))
    assert as_bytes(tree_to_torch(array)) == as_bytes(array)
    assert tree_to_torch(array, copy=True).dtype == getattr(torch, dtype)


@pytest.mark.parametrize(
    ("view", "is_shared"),
    [
        (lambda t: t.t(), True),
        (lambda t: t.permute(1, 0), True),
        (lambda t: t[:, ::2], False),
        (lambda t: t[0].expand(3, 8), False),
        (lambda t: t.flip(0), True),  # torch copies
        (lambda t: t[::1, 1:2], False),
        (lambda t: t[1:1], True),
    ],
)
def test_strides(view, is_shared):
    tensor = view(torch.arange(48.0).reshape(6, 8))
    array = tree_to_jax(tensor)
    np.testing.assert_array_equal(np.asarray(array), tensor.numpy())
    if tensor.numel():
        assert (array.unsafe_buffer_pointer() == tensor.data_ptr()) is is_shared
    if is_shared:
        tree_to_jax(tensor, copy=False)
    else:
        with pytest.raises(BridgeError, match=r"not dense in memory.*copy=None"):
            tree_to_jax(tensor, copy=False)


def test_an_address_that_jax_cannot_use_is_copied_or_refused():
    tensor = torch.arange(9.0)[1:]
    np.testing.assert_array_equal(np.asarray(tree_to_jax(tensor)), tensor.numpy())
    with pytest.raises(BridgeError, match="address"):
        tree_to_jax(tensor, copy=False)


def test_conjugates_and_gradients_are_resolved():
    tensor = torch.tensor([1 + 2j, 3 - 1j], requires_grad=True).conj()
    assert tree_to_jax(tensor).tolist() == [1 - 2j, 3 + 1j]


class Pair(NamedTuple):
    first: object
    second: object


def test_containers_and_other_leaves_stay():
    module = torch.nn.Linear(2, 3)
    tree = {"a": [torch.ones(2), None, 3], "b": Pair(first=torch.zeros(1), second=(2.5, True))}
    arrays = tree_to_jax({**tree, "c": module.state_dict()})
    assert isinstance(arrays["b"], Pair)
    assert arrays["a"][1:] == [None, 3]
    assert arrays["b"].second == (2.5, True)
    assert type(arrays["c"]) is type(module.state_dict())
    assert all(isinstance(leaf, jax.Array) for leaf in arrays["c"].values())
    tensors = tree_to_torch(arrays)
    assert isinstance(tensors["b"].first, torch.Tensor)
    assert tensors["a"][1:] == [None, 3]


@pytest.mark.parametrize("should_copy", [None, True])
def test_memory_is_shared_only_where_told(should_copy):
    tensor = torch.zeros(64)
    array = tree_to_jax(tensor, copy=should_copy)
    tensor.add_(1)
    assert float(array[0]) == (1.0 if should_copy is None else 0.0)

    source = jnp.zeros(64)
    view = tree_to_torch(source, copy=should_copy)
    if should_copy:
        view.add_(1)
        assert float(source.sum()) == 0.0
    else:
        assert view.data_ptr() == source.unsafe_buffer_pointer()


def test_memory_outlives_its_first_owner():
    tensor = torch.full((4096,), 7.0)
    array = tree_to_jax(tensor)
    del tensor
    view = tree_to_torch(jnp.full((4096,), 9.0))
    gc.collect()
    rubbish = [torch.full((4096,), -1.0) for _ in range(64)]
    rubbish += [jnp.full((4096,), -1.0) for _ in range(64)]
    assert set(np.asarray(array)) == {7.0}
    assert set(view.tolist()) == {9.0}
    del rubbish


def test_donation_does_not_reach_the_tensor():
    tensor = torch.ones(1024)
    array = tree_to_jax(tensor)
    grown = jax.jit(lambda x: x + 1, donate_argnums=0)(array)
    assert float(grown.sum()) == 2048.0
    assert float(tensor.sum()) == 1024.0
    assert grown.unsafe_buffer_pointer() != tensor.data_ptr()


def test_donation_does_not_pull_memory_from_under_a_view():
    source = jnp.ones(1024) * 1
    view = tree_to_torch(source)
    grown = jax.jit(lambda x: x + 1, donate_argnums=0)(source)
    assert float(grown.sum()) == 2048.0
    assert float(view.sum()) == 1024.0


def test_integers_of_64_bits_are_narrowed_when_they_fit():
    array = tree_to_jax(torch.tensor([-(2**31), 2**31 - 1]))
    assert array.dtype == jnp.int32
    assert array.tolist() == [-(2**31), 2**31 - 1]
    assert tree_to_jax(torch.zeros(0, dtype=torch.int64)).dtype == jnp.int32
    assert tree_to_jax(torch.tensor([2**32 - 1], dtype=torch.uint64)).tolist() == [2**32 - 1]


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor([2**31]),
        torch.tensor([-(2**31) - 1]),
        torch.tensor([2**32], dtype=torch.uint64),
        torch.tensor([2**64 - 1], dtype=torch.uint64),
    ],
    ids=str,
)
def test_integers_that_do_not_fit_are_refused(tensor):
    with pytest.raises(BridgeError, match=r"values from .*jax_enable_x64"):
        tree_to_jax(tensor)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_wide_floats_are_refused_without_x64(dtype):
    with pytest.raises(BridgeError, match=r"\['x'\].*64-bit.*float\(\)"):
        tree_to_jax({"x": torch.zeros(2, dtype=dtype)})


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.complex128, torch.uint64])
def test_wide_numbers_cross_as_they_are_with_x64(dtype):
    with jax.enable_x64(True):
        tensor = torch.ones(8, dtype=dtype)
        array = tree_to_jax(tensor, copy=False)
        assert array.dtype.itemsize == tensor.element_size()
        assert tree_to_torch(array).dtype == dtype


@pytest.mark.parametrize(
    ("convert", "value", "message"),
    [
        (tree_to_jax, {"a": "x"}, r"tree\['a'\] is a str"),
        (tree_to_jax, torch.zeros(2, device="meta"), "meta device"),
        (tree_to_jax, torch.zeros(2, 2).to_sparse(), "sparse_coo.*to_dense"),
        (tree_to_jax, torch.zeros(2).to(torch.float8_e8m0fnu), "e8m0.*allowed: bool"),
        (tree_to_torch, jnp.zeros(2, jnp.int4), "int4.*allowed: bfloat16"),
        (tree_to_torch, [jax.random.key(0)], r"tree\[0\].*random key.*key_data"),
        (tree_to_torch, np.array(["a"]), "dtype"),
    ],
    ids=["str", "meta", "sparse", "e8m0", "int4", "key", "text"],
)
def test_what_cannot_cross_is_named(convert, value, message):
    with pytest.raises(BridgeError, match=message):
        convert(value)


def test_values_under_a_transformation_are_refused():
    with pytest.raises(BridgeError, match="pure_callback"):
        jax.jit(tree_to_torch)(jnp.ones(2))
    with pytest.raises(BridgeError, match="to_torch"):
        torch.func.vmap(tree_to_jax)(torch.ones(2, 2))


def test_read_only_numpy_arrays_are_copied():
    array = np.arange(4.0, dtype=np.float32)
    array.flags.writeable = False
    tensor = tree_to_torch(array)
    tensor.add_(1)
    assert array.tolist() == [0.0, 1.0, 2.0, 3.0]
    with pytest.raises(BridgeError, match="read-only"):
        tree_to_torch(array, copy=False)


def test_the_device_may_be_named():
    cpu = jax.local_devices(backend="cpu")[0]
    assert tree_to_jax(torch.ones(2), device=cpu).devices() == {cpu}
    assert tree_to_torch(jnp.ones(2), device="cpu").device.type == "cpu"
    assert tree_to_torch(jnp.ones(2), device="meta").is_meta
    with pytest.raises(BridgeError, match="copied"):
        tree_to_torch(jnp.ones(2), device="meta", copy=False)
