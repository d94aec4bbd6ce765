"""One class that every implementation of `graft` passes, interpreted on a CPU or on a device."""

from functools import cache

import numpy as np
import pytest

pytest.importorskip("torch")

from implementations import DEVICE, DTYPES, IN_PLACE, RUNNERS, Outcome, refusal, rounded, truth

from esper_kernels.graft._specs import SPECS, Spec, draw

BY_NAME = {spec.name: spec for spec in SPECS}
HERE = [spec.name for spec in SPECS if spec.is_small or DEVICE != "cpu"]
REFERENCES = ("torch-reference", "jax-reference")
FLOORS = {"bfloat16": 2.0**-9, "float32": 4e-6}
WIDE = 64
"""As Pallas takes chunks."""
PLAIN = Spec(name="plain", rows=72, features=3 * WIDE, chunks=3, slots=3, rank=8, activation="relu")


def bits(array):
    """The float64 image of values, NaN and the sign of zero told apart."""
    return np.ascontiguousarray(array).view(np.int64)


def error(found, true):
    """Size of the difference over the size of the truth."""
    scale = np.linalg.norm(true)
    return np.linalg.norm(found - true) / scale if scale else np.linalg.norm(found)


@cache
def references(spec_name, dtype):
    """What the references make of a spec: the error that is usual in its dtype."""
    spec = BY_NAME[spec_name]
    return [RUNNERS[name](spec, draw(spec), dtype) for name in REFERENCES]


def live_chunks(spec, inputs):
    served = (inputs.slot >= 0) & (inputs.slot < spec.slots)
    return served & inputs.gains.any(axis=1)


def hold(found, true, usual, dtype):
    """Every result that an implementation has, to twice the error of the references."""
    for field in Outcome._fields:
        ours, right = getattr(found, field), getattr(true, field)
        if right is None:
            assert ours is None
            continue
        assert ours.shape == right.shape
        columns = range(5) if field in {"watched", "channels"} else [...]
        for k in columns:
            pick = (slice(None), k) if k is not ... else ...
            # A sum over rows may be lucky in the reference: one rounding of a term is granted.
            floor = FLOORS[dtype] if field in {"bias", "channels"} else 4e-6
            worst = max(error(getattr(of, field)[pick], right[pick]) for of in usual)
            allowed = 2 * worst + floor
            assert error(ours[pick], right[pick]) <= allowed, (field, k)


@pytest.fixture(params=RUNNERS)
def name(request):
    return request.param


def runner(runners, name):
    def run(spec, inputs, dtype="bfloat16"):
        reason = refusal(name, spec, dtype)
        if reason is not None:
            pytest.skip(reason)
        return runners[name](spec, inputs, dtype)

    return run


@pytest.fixture
def run(name):
    return runner(RUNNERS, name)


@pytest.fixture
def run_in_place(name):
    if name not in IN_PLACE:
        pytest.skip("only JAX has forms in place")
    return runner(IN_PLACE, name)


class TestConformance:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("spec_name", HERE)
    def test_no_further_from_the_truth_than_twice_the_reference(self, run, spec_name, dtype):
        spec = BY_NAME[spec_name]
        inputs = draw(spec)
        found, true = run(spec, inputs, dtype), truth(spec, inputs, dtype)
        hold(found, true, references(spec_name, dtype), dtype)

    @pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in Triton's interpreter
    @pytest.mark.parametrize(
        "gains", [(0, 0, 0, 0), (0, 1, 0, 0), (0, 1, 0, 2)], ids=["dormant", "training", "damped"]
    )
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_identity_bit_for_bit_where_nothing_acts(self, run, name, gains, dtype):
        inputs = draw(PLAIN)
        for array in (inputs.x, inputs.dy):
            array[0, :8] = [np.nan, np.inf, -np.inf, -0.0, 0.0, 1e-40, 3e38, -3e38]
        inputs.down[0] = np.nan
        found = run(PLAIN, inputs._replace(gains=np.full((3, 4), gains, np.float32)), dtype)
        for ours, given in ((found.y, inputs.x), (found.dx, inputs.dy)):
            np.testing.assert_array_equal(bits(ours), bits(rounded(name, given, dtype)))

    @pytest.mark.filterwarnings("ignore::RuntimeWarning")
    def test_broken_adapter_reaches_nothing(self, run):
        inputs = draw(PLAIN)
        clean = run(PLAIN, inputs)
        chunk = 1
        slot = int(inputs.slot[chunk])
        down = inputs.down.copy()
        down[slot, 0, 0] = np.nan
        broken = run(PLAIN, inputs._replace(down=down))
        mine = slice(chunk * WIDE, (chunk + 1) * WIDE)
        others = np.r_[0:WIDE, 2 * WIDE : 3 * WIDE]
        for field in ("y", "dx"):
            ours, before = getattr(broken, field), getattr(clean, field)
            np.testing.assert_array_equal(bits(ours[:, others]), bits(before[:, others]))
        host = truth(PLAIN, inputs._replace(slot=np.full(3, -1, np.int32)), "bfloat16")
        np.testing.assert_array_equal(broken.y[:, mine], host.y[:, mine])
        np.testing.assert_array_equal(broken.dx[:, WIDE], host.dx[:, WIDE])
        assert np.isfinite(broken.dx).all()
        for field in ("down", "up", "bias"):
            ours, before = getattr(broken, field), getattr(clean, field)
            assert not ours[slot].any()
            rest = [p for p in range(3) if p != slot]
            np.testing.assert_array_equal(bits(ours[rest]), bits(before[rest]))
        assert broken.channels[chunk, 1:].tolist() == [1, 0, 0, 1]
        np.testing.assert_array_equal(broken.channels[[0, 2]], clean.channels[[0, 2]])

    @pytest.mark.filterwarnings("ignore::RuntimeWarning")
    def test_outputs_that_are_not_finite_are_left_out_entry_by_entry(self, run):
        inputs = draw(PLAIN)
        clean = run(PLAIN, inputs)
        chunk, slot = 1, int(inputs.slot[1])
        up = inputs.up.copy()
        up[slot, :, 0] = np.nan
        broken = run(PLAIN, inputs._replace(up=up))
        host = truth(PLAIN, inputs._replace(slot=np.full(3, -1, np.int32)), "bfloat16")
        first = chunk * WIDE
        rest = np.delete(np.arange(3 * WIDE), first)
        np.testing.assert_array_equal(broken.y[:, first], host.y[:, first])
        np.testing.assert_array_equal(bits(broken.y[:, rest]), bits(clean.y[:, rest]))
        mine = slice(first, first + WIDE)
        np.testing.assert_array_equal(broken.dx[:, mine], host.dx[:, mine])
        for field in ("down", "up", "bias"):
            assert not getattr(broken, field)[slot].any()
        assert broken.channels[chunk, 1:].tolist() == [1, 0, 0, 1]

    @pytest.mark.filterwarnings("ignore::RuntimeWarning")
    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_broken_input_stays_in_its_chunk_and_is_no_error_of_the_adapter(self, run, value):
        inputs = draw(PLAIN)
        clean = run(PLAIN, inputs)
        x = inputs.x.copy()
        x[5, WIDE + 8] = value
        broken = run(PLAIN, inputs._replace(x=x))
        others = np.r_[0:WIDE, 2 * WIDE : 3 * WIDE]
        np.testing.assert_array_equal(bits(broken.y[:, others]), bits(clean.y[:, others]))
        np.testing.assert_array_equal(bits(broken.dx[:, others]), bits(clean.dx[:, others]))
        rows = np.r_[0:5, 6:72]
        np.testing.assert_array_equal(bits(broken.y[rows]), bits(clean.y[rows]))
        assert not broken.channels[:, 4].any()
        np.testing.assert_array_equal(broken.channels[[0, 2]], clean.channels[[0, 2]])

    @pytest.mark.filterwarnings("ignore::RuntimeWarning")
    def test_overflowing_adapter_is_an_error(self, run):
        inputs = draw(PLAIN)
        up = np.full_like(inputs.up, 3e38)
        found = run(PLAIN, inputs._replace(up=up))
        assert found.channels[:, 4].all()
        assert np.isfinite(found.y).all()
        assert not found.down.any()

    def test_same_bits_every_time(self, run):
        inputs = draw(PLAIN)
        for first, second in zip(run(PLAIN, inputs), run(PLAIN, inputs), strict=True):
            assert first is second or np.array_equal(bits(first), bits(second))

    def test_dead_features_are_counted(self, run):
        inputs = draw(PLAIN)
        inputs.x[:, [0, 1, 3 * WIDE - 1]] = 0
        inputs.x[:-1, WIDE + 8] = 0
        assert run(PLAIN, inputs).watched[:, 4].tolist() == [2, 0, 1]

    def test_slots_beyond_the_bank_serve_nobody(self, run):
        inputs = draw(PLAIN)
        found = run(PLAIN, inputs._replace(slot=np.array([3, -7, 1], np.int32)))
        assert found.channels[:, 1].tolist() == [0, 0, 1]
        assert not found.down[[0, 2]].any()

    def test_learn_scales_the_adapter_and_feel_the_input(self, run):
        inputs = draw(PLAIN)
        one = inputs._replace(gains=np.tile(np.float32([1, 1, 1, 0]), (3, 1)))
        half = one._replace(gains=np.tile(np.float32([1, 0.5, 1, 0]), (3, 1)))
        deaf = one._replace(gains=np.tile(np.float32([1, 1, 0, 0]), (3, 1)))
        whole = run(PLAIN, one)
        np.testing.assert_array_equal(2 * run(PLAIN, half).down, whole.down)
        np.testing.assert_array_equal(run(PLAIN, deaf).down, whole.down)
        assert not np.array_equal(run(PLAIN, deaf).dx, whole.dx)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("spec_name", HERE)
    def test_in_place_is_the_same_and_measures_live_chunks_only(
        self, run_in_place, spec_name, dtype
    ):
        spec = BY_NAME[spec_name]
        inputs = draw(spec)
        found, true = run_in_place(spec, inputs, dtype), truth(spec, inputs, dtype)
        dormant = ~live_chunks(spec, inputs)

        def masked(of):
            rows = {"watched": of.watched.copy(), "channels": of.channels.copy()}
            for measured in rows.values():
                measured[dormant] = 0
            of = of._replace(**rows)
            if found.dx is None:
                of = Outcome(of.y, of.watched, *(None,) * 6)
            return of

        assert not found.watched[dormant].any()
        assert found.channels is None or not found.channels[dormant].any()
        hold(found, masked(true), [masked(of) for of in references(spec_name, dtype)], dtype)

    @pytest.mark.filterwarnings("ignore::RuntimeWarning")
    def test_in_place_leaves_what_does_not_act_bit_for_bit(self, run_in_place, name):
        inputs = draw(PLAIN)
        for array in (inputs.x, inputs.dy):
            for chunk in range(3):
                array[0, WIDE * chunk : WIDE * chunk + 8] = [
                    np.nan, np.inf, -np.inf, -0.0, 0.0, 1e-40, 3e38, -3e38,
                ]  # fmt: skip
        inputs.gains[0] = 0
        inputs.gains[1] = [0, 1, 0, 0]
        found = run_in_place(PLAIN, inputs)
        for ours, given in ((found.y, inputs.x), (found.dx, inputs.dy)):
            if ours is not None:
                right = rounded(name, given, "bfloat16")
                np.testing.assert_array_equal(bits(ours[:, : 2 * WIDE]), bits(right[:, : 2 * WIDE]))
        assert found.watched[:, 0].tolist() == [0, 72 * WIDE, 72 * WIDE]

    @pytest.mark.filterwarnings("ignore::RuntimeWarning")
    def test_in_place_tells_broken_adapters_from_broken_input(self, run_in_place):
        inputs = draw(PLAIN)
        inputs.x[5, WIDE + 8] = np.inf
        inputs.down[inputs.slot[2]] = np.nan
        found = run_in_place(PLAIN, inputs)
        assert np.isfinite(found.y[:, :WIDE]).all()
        assert np.isfinite(found.y[:, 2 * WIDE :]).all()
        if found.channels is not None:
            assert found.channels[:, 4].tolist() == [0, 0, 1]
            assert not found.down[inputs.slot[2]].any()
            assert found.down[inputs.slot[0]].any()

    def test_in_place_same_bits_every_time(self, run_in_place):
        inputs = draw(PLAIN)
        pairs = zip(run_in_place(PLAIN, inputs), run_in_place(PLAIN, inputs), strict=True)
        for first, second in pairs:
            assert first is second or np.array_equal(bits(first), bits(second))


DAMPED = (PLAIN, *(BY_NAME[name] for name in ("low_rank", "odd", "gated_remainder")))


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
    given = (None if of is None else rounded(name, of, dtype) for of in inputs[:6])
    x, dy, down, up, bias, gate = given
    found = {
        field: None if of is None else np.zeros_like(of)
        for field, of in (("down", down), ("up", up), ("bias", bias), ("gate", gate))
    }
    starts = np.cumsum(
        [0, *(len(of) for of in np.array_split(np.arange(spec.features), spec.chunks))]
    )
    for chunk in np.flatnonzero(live_chunks(spec, inputs)):
        p, (_, learn, _, damping) = inputs.slot[chunk], inputs.gains[chunk].astype(float)
        width = starts[chunk + 1] - starts[chunk]
        u, g = (of[:, starts[chunk] : starts[chunk + 1]] for of in (x, dy))
        own_down, own_up = down[p, :width], up[p, :, :width]
        h = u @ own_down + (0 if bias is None else bias[p])
        if gate is None:
            a, slope = slope_of(spec.activation, h)
        else:
            z = u @ gate[p, :width]
            slope, slope_z = slope_of("silu", z)
            a = slope * h
        g = g + damping * (a @ own_up)
        d_a = g @ own_up.T
        found["down"][p, :width] = learn * (u.T @ (d_a * slope))
        found["up"][p, :, :width] = learn * (a.T @ g)
        if bias is not None:
            found["bias"][p] = learn * (d_a * slope).sum(0)
        if gate is not None:
            found["gate"][p, :width] = learn * (u.T @ (d_a * h * slope_z))
    return found


class TestDamping:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("spec", DAMPED, ids=lambda spec: spec.name)
    def test_adapter_descends_the_damped_objective_and_nothing_else_changes(
        self, run, name, spec, dtype
    ):
        inputs, damped = mixed(spec)
        undamped = inputs._replace(gains=inputs.gains * np.float32([1, 1, 1, 0]))
        right, plain = (by_hand(name, spec, of, dtype) for of in (inputs, undamped))
        theirs = np.isin(np.arange(spec.slots), inputs.slot[damped])
        allowed = {"bfloat16": 2e-2, "float32": 2e-5}[dtype]
        in_place = [runner(IN_PLACE, name)] if name in IN_PLACE else []
        for each in (run, *in_place):
            found, before = each(spec, inputs, dtype), each(spec, undamped, dtype)
            if found.channels is not None:
                # -<dy, r> may be summed up in another way where r is at hand anyway.
                worth = [of.channels[damped, 3].copy() for of in (found, before)]
                assert error(*worth) < allowed
                found.channels[damped, 3] = before.channels[damped, 3]
            for field in ("y", "watched", "dx", "channels"):
                if getattr(found, field) is not None:
                    pair = (bits(getattr(of, field)) for of in (found, before))
                    np.testing.assert_array_equal(*pair)
            for field, wanted in right.items():
                ours = getattr(found, field)
                if ours is None:
                    continue
                assert error(ours, wanted) < allowed, field
                assert error(ours[theirs], plain[field][theirs]) > 0.05, field
                rest = getattr(before, field)[~theirs]
                np.testing.assert_array_equal(bits(ours[~theirs]), bits(rest))

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_felt_adapter_is_not_damped(self, run, dtype):
        inputs = draw(PLAIN)
        damped = inputs._replace(gains=inputs.gains + np.float32([0, 0, 0, 3]))
        for ours, right in zip(*(run(PLAIN, of, dtype) for of in (damped, inputs)), strict=True):
            assert ours is right or np.array_equal(bits(ours), bits(right))

    @pytest.mark.filterwarnings("ignore::RuntimeWarning")
    def test_damping_that_overflows_is_an_error_and_reaches_nothing(self, run, name):
        inputs = draw(PLAIN)
        inputs.gains[1] = [0, 1, 0, 3e38]
        found, slot = run(PLAIN, inputs), inputs.slot[1]
        assert found.channels[:, 4].tolist() == [0, 1, 0]
        assert not found.down[slot].any()
        mine = slice(WIDE, 2 * WIDE)
        right = rounded(name, inputs.dy, "bfloat16")
        np.testing.assert_array_equal(bits(found.dx[:, mine]), bits(right[:, mine]))

    def test_damping_is_no_work_of_its_own(self, run):
        inputs = draw(PLAIN)
        found = run(PLAIN, inputs._replace(gains=np.tile(np.float32([0, 0, 0, 2]), (3, 1))))
        assert found.channels[:, 1].tolist() == [1, 1, 1]
        assert not found.down.any()

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_pallas_adds_damping_to_what_its_kernels_leave(self, dtype):
        """Its kernels run on a GPU alone; the reference stands for them here."""
        import jax
        import jax.numpy as jnp
        from implementations import strictly

        from esper_kernels import Adapter
        from esper_kernels.graft import check, pallas_mosaic_gpu, reference_jax

        inputs, _ = mixed(PLAIN)
        x, dy = (jnp.asarray(of).astype(dtype) for of in (inputs.x, inputs.dy))
        adapter = Adapter(*(None if of is None else jnp.asarray(of) for of in inputs[2:6]))
        slot, gains = jnp.asarray(inputs.slot), jnp.asarray(inputs.gains)
        case = check(x, adapter, slot, gains, activation="relu", device="cpu")

        @jax.jit
        def pull(gains):
            watched = reference_jax.watch(case, x)
            kernel = gains.at[:, 3].set(0.0)
            dx, *undamped = reference_jax.backward(case, x, dy, adapter, slot, kernel, watched)
            found = pallas_mosaic_gpu._damp(
                case, x, dx, adapter, slot, gains, watched, tuple(undamped)
            )
            right = reference_jax.backward(case, x, dy, adapter, slot, gains, watched)
            return undamped, found, right[1:]

        with strictly():
            undamped, found, right = pull(gains)
            still = pull(gains.at[:, 3].set(0.0))[1]
        for ours, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(right), strict=True):
            # Of bfloat16, a GPU rounds what it fuses in one of the two at other points.
            share = 1e-5 if dtype == "float32" else 2e-2
            assert np.abs(ours - wanted).max() <= share * np.abs(wanted).max()
        for ours, wanted in zip(jax.tree.leaves(still), jax.tree.leaves(undamped), strict=True):
            np.testing.assert_array_equal(ours, wanted)
