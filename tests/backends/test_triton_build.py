"""The kernels compile for GPUs, which need not be there for that."""

import pytest
import torch

pytest.importorskip("triton")

# Records the launches of a forward and a backward pass instead of making them, then compiles each.
# Prints the largest shared memory that a kernel needs, in bytes. In a fresh process, because this
# one interprets the kernels.
CODE = """
import os
os.environ["TRITON_INTERPRET"] = "0"
import torch, triton
from triton.backends.compiler import GPUTarget
from performers.backends import Call
from performers.backends.triton import affine, attend, attention, near
from performers.nn import {feature_map}
from performers.state import LinearState, NearField

TYPES = {{torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}}
TYPES |= {{torch.int64: "*i64", torch.int32: "*i32"}}
launches = {{}}

class Recorder:
    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *arguments, num_warps=4, num_stages=3, **constants):
        names = self.kernel.arg_names
        signature = dict(zip(names, map(self.type_of, arguments))) | dict.fromkeys(
            constants, "constexpr"
        )
        assert set(signature) == set(names), set(names) ^ set(signature)
        source = triton.compiler.ASTSource(
            self.kernel, signature, {{(names.index(name),): x for name, x in constants.items()}}
        )
        options = {{"num_warps": num_warps, "num_stages": num_stages}}
        launches[str((self.kernel.__name__, signature, constants))] = source, options

    def type_of(self, argument):
        if isinstance(argument, torch.Tensor):
            return TYPES[argument.dtype]
        return "fp32" if isinstance(argument, float) else "i32"

modules = attention.states, attention.reading, attention.gradients, attention.decoding
for module in (*modules, near.near_kernels, affine):
    for name, kernel in list(vars(module).items()):
        own = getattr(kernel, "__module__", None) == module.__name__
        if own and isinstance(kernel, triton.runtime.JITFunction):
            setattr(module, name, Recorder(kernel))

phi = {feature_map}({dim}, 256)
for is_causal, length in {calls}:
    query, key, value = torch.randn(3, 1, 2, length, {dim}, dtype=torch.{dtype}).unbind()
    query.requires_grad_({with_backward})
    state = LinearState.empty(1, 2, phi.num_features, {dim})
    call = Call(phi, 1.0, is_causal, True, {near}, has_state=False, dtype=torch.float32)
    out, _ = attend(call, query[:, :, None], key, value, None, state)
    if {with_backward}:
        out.float().sum().backward()
memory = []
for source, options in launches.values():
    built = triton.compile(source, target=GPUTarget("cuda", {capability}, 32), options=options)
    memory.append(built.metadata.shared)
print(len(memory), max(memory))
"""

# All but what the backend refuses: bfloat16 with head dims above 128 before sm_90.
tiles = pytest.mark.parametrize(
    ("dtype", "dim", "capability"),
    [
        (dtype, dim, capability)
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
        for dim in (16, 32, 64, 128, 256)
        for capability in (80, 90)
        if (dtype, dim, capability) != (torch.bfloat16, 256, 80)
    ],
)

# What a program may use, in bytes: 163 KiB on sm_80, 227 KiB on sm_90.
SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10}


def test_bidirectional_bfloat16_and_decoding_compile_for_sm_90(fresh_python):
    printed = fresh_python(
        CODE.format(
            feature_map="SoftmaxFeatures", dim=64, dtype="bfloat16", capability=90,
            calls=[(False, 300), (True, 1)], with_backward=False, near=None,
        )
    )  # fmt: skip
    count, memory = map(int, printed.split())
    assert count == 4
    assert memory <= SHARED_MEMORY[90]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("feature_map", ["SoftmaxFeatures", "KernelFeatures"])
@tiles
def test_every_tile_of_the_table_fits(fresh_python, dtype, dim, capability, feature_map):
    printed = fresh_python(
        CODE.format(
            feature_map=feature_map, dim=dim, dtype=str(dtype).removeprefix("torch."),
            capability=capability, calls=[(False, 300), (True, 300), (True, 1)],
            with_backward=True, near=None,
        )
    )  # fmt: skip
    assert int(printed.split()[1]) <= SHARED_MEMORY[capability]


def test_a_near_field_compiles_for_sm_90(fresh_python):
    assert_near_field_fits(fresh_python, torch.bfloat16, 64, 90)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@tiles
def test_every_tile_of_a_near_field_fits(fresh_python, dtype, dim, capability):
    assert_near_field_fits(fresh_python, dtype, dim, capability)


def assert_near_field_fits(fresh_python, dtype, dim, capability):
    printed = fresh_python(
        CODE.format(
            feature_map="SoftmaxFeatures", dim=dim, dtype=str(dtype).removeprefix("torch."),
            capability=capability, calls=[(False, 300), (True, 300)], with_backward=True,
            near="NearField(64, 4)",
        )
    )  # fmt: skip
    count, memory = map(int, printed.split())
    # three kernels of their own, each causal and not; states of keys and of queries; their sums,
    # from the left and from the right, alone and added to the other; and products of rows
    assert count == 13
    assert memory <= SHARED_MEMORY[capability]
