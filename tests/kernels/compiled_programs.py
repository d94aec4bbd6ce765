"""What compilers see of `graft`, traced without a GPU; run in a process of its own.

Prints a line for every kernel of a forward and of a backward pass: its name, and which of its
arguments torch found that it writes. Triton is told of a Hopper GPU, torch that its kernels serve.
"""

import ast
import builtins
import sys

import torch
import triton
from torch._functorch.aot_autograd import aot_function
from torch._higher_order_ops import triton_kernel_wrap
from torch._inductor.codegen.wrapper import (
    user_defined_triton_kernel_transitive_closure_source_code as source_of,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget

from esper_kernels.graft import _operations
from esper_kernels.graft._specs import SPECS
from esper_kernels.torch import analyse_kernels_once


class Driver:
    """As much of a driver as translating a kernel asks for."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


def report(graph, inputs):
    """Lists the kernels of a program."""
    del inputs
    for node in graph.graph.nodes:
        if node.target is triton_kernel_wrap.triton_kernel_wrapper_functional:
            kernel = triton_kernel_wrap.kernel_side_table.get_kernel(node.kwargs["kernel_idx"])
            print(kernel.fn.__name__, *sorted(node.kwargs["tensors_to_clone"]))
            plain = kernel if hasattr(kernel, "src") else kernel.fn  # torch wraps some for options
            if missing := undefined(source_of(plain)):
                print("its copy lacks", *sorted(missing))
    return graph.forward


def undefined(source):
    """The names that inductor's copy of a kernel, and of what that calls, leaves undefined."""
    nodes = list(ast.walk(ast.parse(source)))
    names = [node for node in nodes if isinstance(node, ast.Name)]
    known = {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    known |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    known |= {node.id for node in names if isinstance(node.ctx, ast.Store)}
    imports = [node for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom))]
    known |= {alias.asname or alias.name for node in imports for alias in node.names}
    return {node.id for node in names} - known - {"triton", "tl", *dir(builtins)}


def trace(spec, dtype, num_sites):
    """Follows `num_sites` sites, one after the other, forward and backward."""
    from esper_kernels.graft._compiled import graft_open

    def loss(x, down, up, bias, gate, slot, gains, tap):
        for _ in range(num_sites):
            rest = down, up, bias, gate, slot, gains, tap, spec.activation, "triton"
            x = graft_open(2 * x, *rest)[0]
        return (x,)

    def learned(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, requires_grad=True)

    matrix = spec.slots, spec.width, spec.rank
    x = learned(spec.rows, spec.features, dtype=dtype)
    up = learned(spec.slots, spec.rank, spec.width)
    bias = learned(spec.slots, spec.rank) if spec.has_bias else None
    gate = learned(*matrix) if spec.activation == "gated" else None
    slot, gains = torch.zeros(spec.chunks, dtype=torch.int32), torch.zeros(spec.chunks, 4)
    inputs = x, learned(*matrix), up, bias, gate, slot, gains, learned(spec.chunks, 10)
    aot_function(loss, fw_compiler=report, bw_compiler=report)(*inputs)[0].sum().backward()


if __name__ == "__main__":
    triton.runtime.driver.set_active(Driver())
    _operations.device_name = lambda x: "NVIDIA H200"
    _operations.refuses_triton = lambda module, case, x: None
    calls = []
    for name in ("identify_accessed_tensors", "identify_mutated_tensors"):
        if look := getattr(triton_kernel_wrap, name, None):

            def counted(*arguments, look=look):
                calls.append(arguments[0])
                return look(*arguments)

            setattr(triton_kernel_wrap, name, counted)
    (spec,) = (spec for spec in SPECS if spec.name == sys.argv[1])
    with analyse_kernels_once(), FakeTensorMode(allow_non_fake_inputs=True):
        trace(spec, getattr(torch, sys.argv[2]), int(sys.argv[3]))
    print("analysed", len(calls))
