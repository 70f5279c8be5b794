"""Compile the Triton kernels for a Hopper GPU, without one; run by a test, in its own process.

The interpreter accepts what the compiler does not, such as a variable that changes its shape.
"""

from itertools import product

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from transfer_surgery import get_activation
from transfer_surgery.units.kernels.triton.functions import _FUNCTIONS, in_triton
from transfer_surgery.units.kernels.triton.kernels import backward_kernel, forward_kernel
from transfer_surgery.units.kernels.triton.launch import warps
from transfer_surgery.units.kernels.triton.layout import Layout, tiles_of

ITEM = {"bf16": 2, "fp16": 2, "fp32": 4}
FIRST = Layout(8, 64, 3136, False)  # channels first
SHORT = Layout(8, 64, 49, False)
LAST = Layout(1, 64, 8 * 196, True)  # channels last


def compiled(kernel, layout, source="relu", target="sin", dtype="bf16", matched=False, **flags):
    """The PTX of one specialisation, as `triton_launch` would ask for it."""
    s, t = in_triton(get_activation(source)), in_triton(get_activation(target))
    tiles = tiles_of(layout, ITEM[dtype], sums=5 if matched else 1)
    constants = {
        "ALIGNED": layout.aligned,
        "GATES_ADJACENT": layout.gates_adjacent,
        "GATES_PER_EXAMPLE": False,
        "NOISE_PER_EXAMPLE": False,
        "TEMPERATURE": 2 / 3,
        "XI": -0.1,
        "ZETA": 1.1,
        "SOURCE": s.function,
        "SOURCE_NUMBERS": s.numbers,
        "TARGET": t.function,
        "TARGET_NUMBERS": t.numbers,
        "BLOCK_GATES": tiles.block_gates,
        "BLOCK_COUNT": tiles.block_count,
    } | flags
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif not name.endswith("_ptr"):
            signature[name] = "i32"
        elif name in ("a_ptr", "w_ptr", "c_ptr", "b_ptr") and not matched:
            signature[name], constants[name] = "constexpr", None
        else:
            big = name in ("x_ptr", "y_ptr", "grad_ptr", "grad_x_ptr")
            signature[name] = f"*{dtype if big else 'fp32'}"
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*")
    }
    code = ASTSource(kernel, signature=signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": warps(kernel, tiles), "enable_fp_fusion": True}
    result = triton.compile(code, target=GPUTarget("cuda", 90, 32), options=options)
    print(kernel.__name__, layout, source, target, dtype, matched, flags, flush=True)
    return result.asm["ptx"]


def main() -> None:
    for kernel, layout, matched in product(
        (forward_kernel, backward_kernel), (FIRST, SHORT, LAST), (False, True)
    ):
        ptx = compiled(kernel, layout, matched=matched)
        assert ".local" not in ptx  # nothing spilled by a function of libdevice
        if layout is FIRST:
            assert "ld.global.v4.b32" in ptx  # 16 bytes per thread
        if layout is LAST:
            assert "ld.global.v2.b32" in ptx
    for dtype in ("fp16", "fp32"):
        compiled(backward_kernel, FIRST, dtype=dtype)
    for flags in (
        {"NOISE_PER_EXAMPLE": True},
        {"GATES_PER_EXAMPLE": True, "TEMPERATURE": None, "XI": None, "ZETA": None},
    ):
        compiled(forward_kernel, FIRST, matched=True, **flags)
        compiled(backward_kernel, LAST, matched=True, **flags)
    names = [*_FUNCTIONS, "gelu", "gelu(approximate='tanh')"]
    for source, target in zip(names[::2], names[1::2] + names[:1], strict=False):
        compiled(backward_kernel, FIRST, source, target)


if __name__ == "__main__":  # doctest imports every file
    main()
