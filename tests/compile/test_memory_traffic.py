"""Traffic with main memory, on programs whose bytes are known: XLA's own count, and sums by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sigmarep.compile import hlo_cost
from sigmarep.compile.memory_traffic import main_memory_bytes

F32 = 4


def compiled(function, *shapes):
    return jax.jit(function).lower(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)).compile()


@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        (lambda x, y: x + y * 2.0, [(256, 64), (256, 64)]),
        (lambda x, y: jnp.tanh(x @ y), [(256, 64), (64, 512)]),
        # Of the operand only the slice is read.
        (lambda x: x[17:33] * 2.0, [(4096, 64)]),
        (lambda x: jax.lax.dynamic_slice(x, (jnp.int32(5), jnp.int32(0)), (3, 64)) + 1.0, [(4096, 64)]),
    ],
)
def test_without_loops_it_is_the_compilers_count(function, shapes):
    program = compiled(function, *shapes)
    np.testing.assert_allclose(
        main_memory_bytes(program.as_text()), program.cost_analysis()["bytes accessed"], rtol=0.02
    )


def test_slices_and_updates_of_a_loop_are_counted_once_per_iteration():
    steps, size = 40, 1000

    def looped(x):
        return jax.lax.map(lambda row: jnp.cumsum(row) * 3.0, x)

    program = compiled(looped, (steps, size))
    count = main_memory_bytes(program.as_text())
    reference = hlo_cost.costs(program.as_text(), program.cost_analysis())
    assert reference.trip_counts == {name: steps for name in reference.trip_counts}
    assert reference.main_memory == count
    # Every row is read and written at least once; the whole array in every iteration would be 40 times that.
    assert 2 * steps * size * F32 <= count <= 10 * 2 * steps * size * F32
    np.testing.assert_allclose(count, reference.bytes, rtol=0.1)


HEAD = "HloModule step, is_scheduled=true\n"


def test_what_the_core_keeps_for_itself_is_not_counted():
    text = f"""{HEAD}
%double (p: f32[64,256]) -> f32[64,256] {{
  %p = f32[64,256]{{1,0}} parameter(0)
  ROOT %sum = f32[64,256]{{1,0:S(1)}} add(%p, %p)
}}

%triple (q: f32[64,256]) -> f32[64,256] {{
  %q = f32[64,256]{{1,0:S(1)}} parameter(0)
  ROOT %product = f32[64,256]{{1,0}} multiply(%q, %q)
}}

ENTRY %main (x: f32[64,256]) -> f32[64,256] {{
  %x = f32[64,256]{{1,0}} parameter(0)
  %inside = f32[64,256]{{1,0:S(1)}} fusion(%x), kind=kLoop, calls=%double
  ROOT %y = f32[64,256]{{1,0}} fusion(%inside), kind=kLoop, calls=%triple
}}
"""
    array = 64 * 256 * F32
    assert main_memory_bytes(text) == 2 * array
    assert main_memory_bytes(text.replace("S(1)", "")) == 4 * array
    # Another space than main memory is the scalar memory.
    assert main_memory_bytes(text.replace("S(1)", "S(6)")) == 2 * array


def test_arrays_have_the_size_of_their_tiles():
    text = f"""{HEAD}
ENTRY %main (x: bf16[3,197,5]) -> bf16[3,197,5] {{
  %x = bf16[3,197,5]{{1,2,0:T(8,128)(2,1)}} parameter(0)
  ROOT %y = bf16[3,197,5]{{2,1,0:T(8,128)(2,1)}} copy(%x)
}}
"""
    # Most minor is the axis of 197 in the operand, that of 5 in the result.
    assert main_memory_bytes(text) == 2 * 3 * (256 * 8 + 200 * 128)


def test_a_transfer_counts_at_its_start_by_its_ends():
    text = f"""{HEAD}
ENTRY %main (x: f32[64,256]) -> f32[16,256] {{
  %x = f32[64,256]{{1,0}} parameter(0)
  %start = (f32[64,256]{{1,0}}, f32[64,256]{{1,0:S(1)}}, u32[]{{:S(2)}}) copy-start(%x)
  %near = f32[64,256]{{1,0:S(1)}} copy-done(%start)
  %part = ((f32[64,256]{{1,0}}), f32[16,256]{{1,0:S(1)}}, s32[]{{:S(2)}}) slice-start(%x), slice={{[0:16], [0:256]}}
  %own = f32[16,256]{{1,0:S(1)}} slice-done(%part)
  %room = f32[128,256]{{1,0}} custom-call(), custom_call_target="AllocateBuffer"
  ROOT %back = f32[16,256]{{1,0}} copy(%own)
}}
"""
    whole, part = 64 * 256 * F32, 16 * 256 * F32
    # Read in full, read in part, and the last copy written.
    assert main_memory_bytes(text) == whole + part + part


def test_a_fusion_reads_slices_and_writes_updates_through_what_is_fused_within_it():
    text = f"""{HEAD}
%cut (stack: f32[12,64,256], i: s32[]) -> f32[64,256] {{
  %stack = f32[12,64,256]{{2,1,0}} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %row = f32[1,64,256]{{2,1,0}} dynamic-slice(%stack, %i, %zero, %zero), dynamic_slice_sizes={{1,64,256}}
  ROOT %flat = f32[64,256]{{1,0}} bitcast(%row)
}}

%next (stack.1: f32[12,64,256], i.1: s32[]) -> f32[12,64,256] {{
  %stack.1 = f32[12,64,256]{{2,1,0}} parameter(0)
  %i.1 = s32[] parameter(1)
  %zero.1 = s32[] constant(0)
  %flat.1 = f32[64,256]{{1,0}} fusion(%stack.1, %i.1), kind=kLoop, calls=%cut
  %twice = f32[64,256]{{1,0}} add(%flat.1, %flat.1)
  %row.1 = f32[1,64,256]{{2,1,0}} bitcast(%twice)
  ROOT %new = f32[12,64,256]{{2,1,0}} dynamic-update-slice(%stack.1, %row.1, %i.1, %zero.1, %zero.1)
}}

ENTRY %main (x: f32[12,64,256], n: s32[]) -> f32[12,64,256] {{
  %x = f32[12,64,256]{{2,1,0}} parameter(0)
  %n = s32[]{{:S(6)}} parameter(1)
  ROOT %y = f32[12,64,256]{{2,1,0}} fusion(%x, %n), kind=kLoop, calls=%next
}}
"""
    assert main_memory_bytes(text) == 2 * 64 * 256 * F32
