"""Compiles the Triton kernels of `graft` for compute capability 9.0; wants no GPU.

Run in a process of its own, where Triton is not interpreted: prints a line for each kernel.
"""

import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.tools.tensor_descriptor import TensorDescriptor

from esper_kernels.graft import Adapter, _triton_plan, check, triton_cuda
from esper_kernels.graft._blocks import backward_tiles
from esper_kernels.graft._specs import SPECS

HOPPER = GPUTarget("cuda", 90, 32)
NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.int32: "i32"}


def kind(argument):
    if isinstance(argument, TensorDescriptor):
        return f"tensordesc<{NAMES[argument.base.dtype]}{list(argument.block_shape)}>"
    return f"*{NAMES[argument.dtype]}" if isinstance(argument, torch.Tensor) else "i32"


class Compiled:
    """Stands for a kernel: a launch compiles it."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *arrays, num_warps=4, launch_pdl=False, **constants):
        names = self.kernel.arg_names
        kinds = dict(zip(names, map(kind, arrays), strict=False))
        kinds |= dict.fromkeys(constants, "constexpr")
        source = triton.compiler.ASTSource(
            self.kernel,
            signature={name: kinds.pop(name) for name in names},
            constexprs={(names.index(name),): value for name, value in constants.items()},
        )
        assert not kinds, f"{self.kernel.__name__} takes no {', '.join(kinds)}"
        options = {"num_warps": num_warps, "launch_pdl": launch_pdl}
        built = triton.compile(source, target=HOPPER, options=options)
        print(self.kernel.__name__, built.metadata.shared)


def compile_all(spec, dtype):
    """Every kernel that forward, the form in place and backward would launch."""

    def array(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype)

    matrix = (spec.slots, spec.width, spec.rank)
    adapter = Adapter(
        down=array(*matrix),
        up=array(spec.slots, spec.rank, spec.width),
        bias=array(spec.slots, spec.rank) if spec.has_bias else None,
        gate=array(*matrix) if spec.activation == "gated" else None,
    )
    x = array(spec.rows, spec.features, dtype=dtype)
    slot, gains = array(spec.chunks, dtype=torch.int32), array(spec.chunks, 4)
    case = check(x, adapter, slot, gains, activation=spec.activation, device="NVIDIA H200")
    assert triton_cuda.refuses(case) is None
    for counters in (triton_cuda.arrivals, lambda x, chunks, stream: None):
        triton_cuda.arrivals = counters
        watched = triton_cuda.forward(case, x, adapter, slot, gains)[1]
        triton_cuda.watch(case, x)
        triton_cuda.backward(case, x, x, adapter, slot, gains, watched)
    # As a compiler starts it: with arrays, whose tiles the kernel describes.
    tiles = backward_tiles(case)
    main = _triton_plan.backward_launches(
        case, tiles, is_counted=False, is_beside=True, is_open=True
    ).main
    bank = [x if leaf is None else leaf for leaf in adapter]
    arrays = x, x, x, *bank, slot, gains, watched, watched, *bank, watched, slot
    sizes = case.rows, case.features, case.chunks, case.slots
    main.kernel[(main.programs,)](*arrays, *sizes, **main.constants)


if __name__ == "__main__":
    for name in [name for name in vars(_triton_plan) if name.endswith("_kernel")]:
        setattr(_triton_plan, name, Compiled(getattr(_triton_plan, name)))
    for spec in SPECS:
        if spec.name == sys.argv[1]:
            compile_all(spec, getattr(torch, sys.argv[2]))
