"""What torch asks of an operation: registration, compilation, streams and graphs, clear errors."""

from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import replace
from importlib.util import find_spec

import pytest

pytest.importorskip("torch")

import torch
from implementations import DEVICE, torch_arguments

import esper_kernels.torch as kernels
from esper_kernels import Adapter, ArgumentError, UnavailableError
from esper_kernels.graft import check
from esper_kernels.graft._blocks import Tiles
from esper_kernels.graft._specs import SPECS, Spec, draw

SPEC = Spec(name="small", rows=64, features=64, chunks=4, slots=3, rank=4, activation="gelu")
TALL = Spec(name="tall", rows=300, features=64, chunks=4, slots=3, rank=4, activation="gelu")
HAS_TRITON = find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton has no build for this platform")
IMPLEMENTATIONS = ["reference", pytest.param("triton", marks=needs_triton)]

if HAS_TRITON:
    import triton

    from esper_kernels.graft import _stream, triton_cuda
    from esper_kernels.graft._stream import arrivals, current_stream, floats


def arguments(spec=SPEC, dtype="float32"):
    return torch_arguments(spec, draw(spec), dtype)


def assert_compiles(implementation, spec=TALL, dtype="float32", columns=5, **options):
    """Several compiled calls, then the same without a compiler, give the same bits."""

    def loss(x, down, up, bias, gate, tap):
        y, watched = kernels.graft(
            2 * x,
            Adapter(down, up, bias, gate),
            slot,
            gains,
            tap,
            activation=spec.activation,
            implementation=implementation,
        )
        return (y.float() ** 2).sum() + watched.detach().sum(), y.detach(), watched

    torch._dynamo.reset()
    x, adapter, slot, gains = arguments(spec, dtype)
    results = []
    for function in (torch.compile(loss, fullgraph=True, **options), loss):
        for scale in (1.0, 0.5, 0.25):
            tap = torch.zeros((spec.chunks, columns), device=DEVICE)
            inputs = (scale * x, *adapter, tap)
            leaves = [None if leaf is None else leaf.clone().requires_grad_() for leaf in inputs]
            total, *rest = function(*leaves)
            total.backward()
            grads = [leaf.grad for leaf in leaves if leaf is not None]
            results.append([result.clone() for result in (*rest, *grads)])
    for compiled, plain in zip(results[:3], results[3:], strict=True):
        for first, second in zip(compiled, plain, strict=True):
            assert torch.equal(first, second)


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request):
    return request.param


class TestRegistration:
    def test_operations_keep_torchs_contract(self, implementation):
        x, adapter, slot, gains = arguments()
        leaves = [None if leaf is None else leaf.requires_grad_() for leaf in adapter]
        inputs = (x.requires_grad_(), *leaves, slot, gains, None, "gelu", implementation)
        torch.library.opcheck(torch.ops.esper.graft.default, inputs)

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, by torch
    @pytest.mark.parametrize("columns", [5, 10])
    def test_compiles_without_a_graph_break(self, implementation, columns):
        assert_compiles(implementation, columns=columns, backend="aot_eager")

    @needs_triton
    @pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, by torch
    @pytest.mark.skipif(DEVICE == "cpu", reason="a GPU's code")
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    @pytest.mark.parametrize("name", ["mlp", "gated_remainder", "low_rank", "dormant", "odd"])
    def test_inductor_launches_the_kernels(self, name, dtype):
        (spec,) = (spec for spec in SPECS if spec.name == name)
        assert_compiles("triton", spec, dtype, columns=10)

    @needs_triton
    @pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, by torch
    @pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning")  # torch's first one
    @pytest.mark.skipif(DEVICE == "cpu", reason="graphs are a GPU's")
    def test_compiler_captures_the_very_first_call(self, monkeypatch):
        for name in ("_pools", "_used", "_counters", "_floats"):
            monkeypatch.setattr(_stream, name, {})
        assert_compiles("triton", mode="reduce-overhead")

    @needs_triton
    def test_everything_is_written(self):
        x, adapter, slot, gains = arguments()
        slot[0] = -1
        with torch.no_grad():
            before = _everything(x, adapter, slot, gains)
            torch.use_deterministic_algorithms(True)  # what is allocated then holds NaN
            try:
                after = _everything(x, adapter, slot, gains)
            finally:
                torch.use_deterministic_algorithms(False)
        for first, second in zip(before, after, strict=True):
            assert torch.equal(first, second)

    @needs_triton
    def test_tiles_change_no_value_by_more_than_rounding(self):
        x, adapter, slot, gains = arguments()
        case = kernels_case(x, adapter, slot, gains)
        for splits in (1, 2, 3):
            tiles = Tiles(rows=16, splits=splits, warps=4, stages=1)
            y, watched = triton_cuda.forward(case, x, adapter, slot, gains, tiles=tiles)
            usual, sums = triton_cuda.forward(case, x, adapter, slot, gains)
            torch.testing.assert_close(y, usual)
            torch.testing.assert_close(watched, sums)


def kernels_case(x, adapter, slot, gains):
    return check(x, adapter, slot, gains, activation="gelu", device="cpu")


def _everything(x, adapter, slot, gains):
    case = kernels_case(x, adapter, slot, gains)
    y, watched = triton_cuda.forward(case, x, adapter, slot, gains)
    dx, d_adapter, channels = triton_cuda.backward(case, x, x + 1, adapter, slot, gains, watched)
    return [y, watched, dx, *d_adapter[:3], channels]


class TestWatch:
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    @pytest.mark.parametrize(("shape", "chunks"), [((3, 20, 64), 4), ((40, 30), 7), ((0, 8), 2)])
    def test_is_what_graft_watches(self, implementation, shape, chunks, dtype):
        x = torch.randn(shape, device=DEVICE).to(getattr(torch, dtype))
        if x.numel():
            x[..., 5] = 0
        before = x.clone()
        watched = kernels.watch(x, chunks, implementation=implementation)
        width = -(-shape[-1] // chunks)
        nothing = Adapter(
            down=torch.zeros((1, width, 1), device=DEVICE),
            up=torch.zeros((1, 1, width), device=DEVICE),
        )
        slot = torch.full((chunks,), -1, dtype=torch.int32, device=DEVICE)
        gains = torch.zeros((chunks, 4), device=DEVICE)
        rows = x.reshape(-1, shape[-1])
        right = kernels.graft(rows, nothing, slot, gains, implementation=implementation)[1]
        assert torch.equal(watched, right)
        assert torch.equal(x, before)
        assert watched[:, 4].sum() == (1 if x.numel() else shape[-1])

    @needs_triton
    @pytest.mark.skipif(DEVICE == "cpu", reason="graphs are a GPU's")
    def test_graph_that_captures_the_first_call_keeps_nothing_for_others(self):
        triton_cuda.calls.cache_clear()
        x = arguments(TALL)[0]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = kernels.watch(x, 4, implementation="triton")
        right = kernels.watch(x, 4, implementation="triton")
        graph.replay()
        assert torch.equal(captured, right)
        assert torch.equal(right[:, 0], torch.full_like(right[:, 0], 300 * 16))

    def test_refuses(self):
        with pytest.raises(ArgumentError, match="chunks is 9"):
            kernels.watch(torch.ones(2, 8), 9)
        with pytest.raises(ArgumentError, match="contiguous"):
            kernels.watch(torch.ones(8, 2).T, 2)


@needs_triton
class TestCounters:
    def run(self):
        x, adapter, slot, gains = arguments(TALL)
        case = kernels_case(x, adapter, slot, gains)
        tiles = Tiles(rows=32, splits=3, warps=4, stages=1)
        watched = triton_cuda.forward(case, x, adapter, slot, gains, tiles=tiles)[1]
        dy = torch.flip(x, (0,))
        pulled = triton_cuda.backward(case, x, dy, adapter, slot, gains, watched, tiles=tiles)
        grads = [leaf for leaf in pulled[1] if leaf is not None]
        return [watched, pulled[2], *grads]

    def test_are_zero_after_every_call(self):
        self.run()
        x = torch.empty(1, device=DEVICE)
        counters = arrivals(x, 4, current_stream(x))
        assert not counters.any()

    def test_change_no_bit(self, monkeypatch):
        counted = self.run()
        monkeypatch.setattr(triton_cuda, "arrivals", lambda *arguments: None)
        for first, second in zip(counted, self.run(), strict=True):
            assert torch.equal(first, second)

    def test_only_one_kernel_of_a_bound_call_uses_what_a_stream_keeps(self, monkeypatch):
        sizes = []

        def noting(x, size, stream):
            sizes.append(size)
            return floats(x, size, stream)

        monkeypatch.setattr(triton_cuda, "floats", noting)
        self.run()
        assert not sizes
        x, adapter, slot, gains = arguments(TALL)
        tiles = Tiles(rows=32, splits=3, warps=4, stages=1)
        for num_sizes, counters in ((2, arrivals), (0, lambda *arguments: None)):
            monkeypatch.setattr(triton_cuda, "arrivals", counters)
            bound = triton_cuda.Calls(
                kernels_case(x, adapter, slot, gains), tiles=tiles, is_bound=True
            )
            watched = bound.forward(x, adapter, slot, gains)[1]
            bound.backward(x, x, adapter, slot, gains, watched)
            assert len(sizes) == num_sizes
            sizes.clear()

    def test_there_are_none_for_more_chunks_than_are_counted(self):
        x = torch.empty(1, device=DEVICE)
        assert arrivals(x, 5_000, current_stream(x)) is None

    @pytest.mark.skipif(DEVICE == "cpu", reason="streams and graphs are a GPU's")
    def test_streams_and_graphs_have_their_own(self):
        x = torch.empty(1, device=DEVICE)

        def take(function):
            return function(x, 4, current_stream(x))

        for function in (arrivals, floats):
            first = take(function)
            with torch.cuda.stream(torch.cuda.Stream()):
                second = take(function)
            arrays = [first, second]
            with torch.cuda.graph(torch.cuda.CUDAGraph()):
                arrays += [take(function), take(function)]
                x.zero_()  # torch warns of a graph with nothing in it
            assert len({array.data_ptr() for array in arrays}) == 4
            assert take(function).data_ptr() == first.data_ptr()

    @pytest.mark.skipif(DEVICE == "cpu", reason="graphs are a GPU's")
    def test_graphs_beside_each_other_keep_their_results(self):
        inputs = arguments(TALL, "bfloat16")
        case = kernels_case(*inputs)
        right = triton_cuda.forward(case, *inputs)[1]
        graphs, streams, results = [], [], []
        for _ in range(4):
            graphs.append(torch.cuda.CUDAGraph())
            streams.append(torch.cuda.Stream())
            with torch.cuda.graph(graphs[-1]):
                results.append(triton_cuda.forward(case, *inputs)[1])
        for _ in range(20):
            for graph, stream in zip(graphs, streams, strict=True):
                with torch.cuda.stream(stream):
                    graph.replay()
        torch.cuda.synchronize()
        for watched in results:
            assert torch.equal(watched, right)


@needs_triton
class TestBoundCalls:
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    @pytest.mark.parametrize("rank", [4, 16])
    def test_give_the_bits_of_others_in_every_thread(self, dtype, rank):
        x, adapter, slot, gains = arguments(replace(TALL, rank=rank), dtype)
        device = "cpu" if DEVICE == "cpu" else torch.cuda.get_device_name()
        case = check(x, adapter, slot, gains, activation="gelu", device=device)
        dy, requests = torch.flip(x, (0,)), []

        def results(calls):
            y, watched = calls.forward(x, adapter, slot, gains)
            pulled = calls.backward(x, dy, adapter, slot, gains, watched, is_beside=True)
            return [
                y,
                watched,
                pulled[0],
                pulled[2],
                *(leaf for leaf in pulled[1] if leaf is not None),
            ]

        def thrice():
            triton.set_allocator(lambda *arguments: requests.append(arguments))
            return [results(bound) for _ in range(3)]

        bound = triton_cuda.Calls(case, is_bound=True)
        right = results(triton_cuda.Calls(case))
        repeated = copy_context().run(thrice)
        with ThreadPoolExecutor(1) as other:
            repeated += other.submit(thrice).result()
        for each in repeated:
            for first, second in zip(each, right, strict=True):
                assert torch.equal(first, second)
        assert not requests  # the caller's own allocator serves the caller's kernels


class TestBadInput:
    def refuse(self, match, activation="gelu", **changes):
        x, adapter, slot, gains = arguments()
        inputs = {"x": x, "adapter": adapter, "slot": slot, "gains": gains}
        for name, change in changes.items():
            inputs[name] = change(inputs[name])
        with pytest.raises(ArgumentError, match=match):
            kernels.graft(**inputs, activation=activation)

    def test_dtype(self):
        self.refuse(r"x\.dtype is float16.*bfloat16 or float32", x=lambda x: x.half())
        self.refuse(r"slot\.dtype is int64", slot=lambda slot: slot.long())

    def test_rank(self):
        self.refuse(r"x\.ndim is 3", x=lambda x: x[None])

    def test_layout(self):
        self.refuse("x is not contiguous", x=lambda x: x.T.contiguous().T)

    def test_chunks(self):
        self.refuse(r"adapter\.down\.shape", x=lambda x: x[:, :60].contiguous())
        self.refuse(
            r"slot\.shape\[0\] is 64",
            x=lambda x: x[:, :3].contiguous(),
            slot=lambda slot: slot.repeat(16),
        )

    def test_activation(self):
        self.refuse("none, relu, gelu, silu, gated", activation="tanh")
        self.refuse(r"adapter\.gate is None", activation="gated")

    def test_mixed_devices(self):
        self.refuse("gains is on meta", gains=lambda gains: gains.to("meta"))


class TestDispatch:
    @needs_triton
    def test_auto_says_what_runs(self):
        choice = kernels.explain(*arguments(), activation="gelu")
        assert choice.implementation == "triton"
        assert str(choice) == "graft: triton"

    @needs_triton
    def test_too_wide_for_triton_runs_the_reference_and_says_why(self):
        spec = Spec(name="wide", rows=4, features=600, chunks=2, slots=1, rank=4)
        x, adapter, slot, gains = arguments(spec)
        choice = kernels.explain(x, adapter, slot, gains, activation="relu")
        assert choice.implementation == "reference"
        assert "300 wide" in choice.refusals["triton"]
        with pytest.raises(UnavailableError, match="triton: a chunk 300 wide"):
            kernels.graft(x, adapter, slot, gains, activation="relu", implementation="triton")

    @needs_triton
    def test_forced_triton_without_a_gpu(self, monkeypatch):
        if DEVICE != "cpu":
            pytest.skip("there is one")
        monkeypatch.setattr(triton_cuda, "IS_INTERPRETED", False)
        with pytest.raises(UnavailableError, match="Triton needs a CUDA device"):
            kernels.graft(*arguments(), activation="gelu", implementation="triton")

    @pytest.mark.parametrize("name", ["pallas", "cuda"])
    def test_names_that_torch_does_not_have(self, name):
        with pytest.raises((UnavailableError, ArgumentError), match=r"torch has|must be one of"):
            kernels.explain(*arguments(), activation="gelu", implementation=name)
