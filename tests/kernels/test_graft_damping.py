"""Every implementation of `graft` damps what an adapter learns that does not act."""

import numpy as np
import pytest

pytest.importorskip("torch")

from conformance import BY_NAME, PLAIN, WIDE, bits, error, live_chunks, runner
from implementations import DEVICE, DTYPES, IN_PLACE, rounded

from esper_kernels.graft._specs import draw

CASES = [
    (PLAIN, "bfloat16"),
    (PLAIN, "float32"),
    (BY_NAME["low_rank"], "float32"),
    (BY_NAME["odd"], "bfloat16"),
    (BY_NAME["gated_remainder"], "float32"),
]
ALL = [(spec, dtype) for spec in dict.fromkeys(spec for spec, _ in CASES) for dtype in DTYPES]


def mixed(spec):
    """Every second live adapter learns unfelt and damped, the others have the usual gains."""
    inputs = draw(spec)
    live = np.flatnonzero(live_chunks(spec, inputs))[::2]
    inputs.gains[live] = [(0, 0.5 + 0.25 * k, 0, 0.5 + k) for k in range(len(live))]
    return inputs, live


def slope_of(activation, z):
    """`phi` and its derivative by hand."""
    sigmoid = 1 / (1 + np.exp(-z))
    if activation == "relu":
        return np.maximum(z, 0), (z > 0).astype(float)
    if activation == "gelu":
        t = np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3))
        inner = np.sqrt(2 / np.pi) * (1 + 3 * 0.044715 * z**2)
        return z * (1 + t) / 2, (1 + t) / 2 + z * (1 - t**2) * inner / 2
    if activation == "silu":
        return z * sigmoid, sigmoid * (1 + z * (1 - sigmoid))
    return z, np.ones_like(z)


def by_hand(name, spec, inputs, dtype):
    """The adapters' gradients in float64, chunk by chunk: `(d r / d theta)^T (dy + damping r)`."""
    leaves = (None if leaf is None else rounded(name, leaf, dtype) for leaf in inputs[:6])
    x, dy, down, up, bias, gate = leaves
    gradients = {
        field: None if leaf is None else np.zeros_like(leaf)
        for field, leaf in (("down", down), ("up", up), ("bias", bias), ("gate", gate))
    }
    chunks = np.array_split(np.arange(spec.features), spec.chunks)
    for chunk in np.flatnonzero(live_chunks(spec, inputs)):
        slot, (_, scale, _, damping) = inputs.slot[chunk], inputs.gains[chunk].astype(float)
        width = len(chunks[chunk])
        u, g = (leaf[:, chunks[chunk]] for leaf in (x, dy))
        own_down, own_up = down[slot, :width], up[slot, :, :width]
        h = u @ own_down + (0 if bias is None else bias[slot])
        if gate is None:
            a, slope = slope_of(spec.activation, h)
        else:
            z = u @ gate[slot, :width]
            slope, slope_z = slope_of("silu", z)
            a = slope * h
        g = g + damping * (a @ own_up)
        d_a = g @ own_up.T
        gradients["down"][slot, :width] = scale * (u.T @ (d_a * slope))
        gradients["up"][slot, :, :width] = scale * (a.T @ g)
        if bias is not None:
            gradients["bias"][slot] = scale * (d_a * slope).sum(0)
        if gate is not None:
            gradients["gate"][slot, :width] = scale * (u.T @ (d_a * h * slope_z))
    return gradients


class TestDamping:
    @pytest.mark.parametrize(
        ("spec", "dtype"),
        CASES if DEVICE == "cpu" else ALL,
        ids=lambda value: str(getattr(value, "name", value)),
    )
    def test_adapter_descends_the_damped_objective_and_nothing_else_changes(
        self, run, name, spec, dtype
    ):
        inputs, damped = mixed(spec)
        undamped = inputs._replace(gains=inputs.gains * np.float32([1, 1, 1, 0]))
        right, plain = (by_hand(name, spec, each, dtype) for each in (inputs, undamped))
        theirs = np.isin(np.arange(spec.slots), inputs.slot[damped])
        allowed = {"bfloat16": 2e-2, "float32": 2e-5}[dtype]
        in_place = [runner(IN_PLACE, name)] if name in IN_PLACE else []
        for compute in (run, *in_place):
            ours, before = compute(spec, inputs, dtype), compute(spec, undamped, dtype)
            # -<dy, r> may be summed up in another way where r is at hand anyway.
            worth = [results.channels[damped, 3].copy() for results in (ours, before)]
            assert error(*worth) < allowed
            ours.channels[damped, 3] = before.channels[damped, 3]
            for field in ("y", "watched", "dx", "channels"):
                pair = (bits(getattr(results, field)) for results in (ours, before))
                np.testing.assert_array_equal(*pair)
            for field, true in right.items():
                leaf = getattr(ours, field)
                if leaf is None:
                    continue
                assert error(leaf, true) < allowed, field
                assert error(leaf[theirs], plain[field][theirs]) > 0.05, field
                rest = getattr(before, field)[~theirs]
                np.testing.assert_array_equal(bits(leaf[~theirs]), bits(rest))

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_felt_adapter_is_not_damped(self, run, dtype):
        inputs = draw(PLAIN)
        damped = inputs._replace(gains=inputs.gains + np.float32([0, 0, 0, 3]))
        results = (run(PLAIN, each, dtype) for each in (damped, inputs))
        for ours, right in zip(*results, strict=True):
            assert ours is right or np.array_equal(bits(ours), bits(right))

    @pytest.mark.filterwarnings("ignore::RuntimeWarning")
    def test_damping_that_overflows_is_an_error_and_reaches_nothing(self, run, name):
        inputs = draw(PLAIN)
        inputs.gains[1] = [0, 1, 0, 3e38]
        outcome, slot = run(PLAIN, inputs), inputs.slot[1]
        assert outcome.channels[:, 4].tolist() == [0, 1, 0]
        assert not outcome.down[slot].any()
        mine = slice(WIDE, 2 * WIDE)
        right = rounded(name, inputs.dy, "bfloat16")
        np.testing.assert_array_equal(bits(outcome.dx[:, mine]), bits(right[:, mine]))

    def test_damping_is_no_work_of_its_own(self, run):
        inputs = draw(PLAIN)
        outcome = run(PLAIN, inputs._replace(gains=np.tile(np.float32([0, 0, 0, 2]), (3, 1))))
        assert outcome.channels[:, 1].tolist() == [1, 1, 1]
        assert not outcome.down.any()

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_pallas_adds_damping_to_what_its_kernels_leave(self, dtype):
        """Its kernels run on a GPU alone; the reference stands for them here."""
        import jax
        import jax.numpy as jnp
        from implementations import strictly

        from esper_kernels import Adapter
        from esper_kernels.graft import check, pallas_mosaic_gpu, reference_jax

        inputs, _ = mixed(PLAIN)
        x, dy = (jnp.asarray(leaf).astype(dtype) for leaf in (inputs.x, inputs.dy))
        adapter = Adapter(*(None if leaf is None else jnp.asarray(leaf) for leaf in inputs[2:6]))
        slot, gains = jnp.asarray(inputs.slot), jnp.asarray(inputs.gains)
        case = check(x, adapter, slot, gains, activation="relu", device="cpu")

        @jax.jit
        def pull(gains):
            watched = reference_jax.watch(case, x)
            kernel = gains.at[:, 3].set(0.0)
            dx, *undamped = reference_jax.backward(case, x, dy, adapter, slot, kernel, watched)
            ours = pallas_mosaic_gpu._damp(
                case, x, dx, adapter, slot, gains, watched, tuple(undamped)
            )
            right = reference_jax.backward(case, x, dy, adapter, slot, gains, watched)
            return undamped, ours, right[1:]

        with strictly():
            undamped, ours, right = pull(gains)
            still = pull(gains.at[:, 3].set(0.0))[1]
        for leaf, true in zip(jax.tree.leaves(ours), jax.tree.leaves(right), strict=True):
            # A GPU rounds bfloat16 at other points in one of the two, which it fuses otherwise.
            share = 1e-5 if dtype == "float32" else 2e-2
            assert np.abs(leaf - true).max() <= share * np.abs(true).max()
        for leaf, before in zip(jax.tree.leaves(still), jax.tree.leaves(undamped), strict=True):
            np.testing.assert_array_equal(leaf, before)
