"""The traffic counter on a program whose bytes are known."""

import jax
import jax.numpy as jnp
import pytest

from vtts_jax.testing import hlo

STATE = '(s32[]{:S(6)}, f32[3,4,8]{2,1,0}, bf16[100,8]{1,0})'
PROGRAM = """HloModule m, is_scheduled=true

%slice (p0: f32[3,4,8], p1: s32[]) -> f32[4,8] {
  %p1 = s32[] parameter(1)
  %p0 = f32[3,4,8]{2,1,0} parameter(0)
  %zero = s32[] constant(0)
  %taken = f32[1,4,8]{2,1,0} dynamic-slice(%p0, %p1, %zero, %zero), dynamic_slice_sizes={1,4,8}
  ROOT %flat = f32[4,8]{1,0} bitcast(%taken)
}

%body (arg: (s32[], f32[3,4,8], bf16[100,8])) -> (s32[], f32[3,4,8], bf16[100,8]) {
  %arg = STATE parameter(0)
  %i = s32[]{:S(6)} get-tuple-element(%arg), index=0
  %w = f32[3,4,8]{2,1,0} get-tuple-element(%arg), index=1
  %c = bf16[100,8]{1,0} get-tuple-element(%arg), index=2
  %layer = f32[4,8]{1,0:T(8,128)S(1)} fusion(%w, %i), kind=kLoop, calls=%slice
  %row = bf16[1,8]{1,0:T(8,128)S(1)} convert(%layer)
  %new = bf16[100,8]{1,0} dynamic-update-slice(%c, %row, %i, %i)
  %copied = f32[4,8]{1,0} copy(%layer)
  ROOT %out = STATE tuple(%i, %w, %new)
}

%cond (arg.1: (s32[], f32[3,4,8], bf16[100,8])) -> pred[] {
  %arg.1 = STATE parameter(0)
  %n = s32[] constant(3)
  %i.1 = s32[]{:S(6)} get-tuple-element(%arg.1), index=0
  ROOT %less = pred[] compare(%i.1, %n), direction=LT
}

ENTRY %main (w.1: f32[3,4,8], c.1: bf16[100,8]) -> bf16[100,8] {
  %w.1 = f32[3,4,8]{2,1,0} parameter(0)
  %c.1 = bf16[100,8]{1,0} parameter(1)
  %start = s32[]{:S(6)} constant(0)
  %all = STATE tuple(%start, %w.1, %c.1)
  %loop = STATE while(%all), condition=%cond, body=%body
  ROOT %end = bf16[100,8]{1,0} get-tuple-element(%loop), index=2
}
""".replace('STATE', STATE)


def test_loops_slices_updates_and_memory_on_the_chip():
  layer, row = 4 * 8 * 4, 8 * 2  # read into the chip; copied back; one row written
  assert hlo.traffic(PROGRAM) == 3 * (layer + layer + row)
  with pytest.raises(ValueError, match='number of trips'):
    hlo.traffic(PROGRAM.replace('constant(3)', 'parameter(1)'))


def test_a_product_reads_and_writes_once():
  shape = jax.ShapeDtypeStruct((64, 64), jnp.float32)
  program = jax.jit(lambda x, w: x @ w).lower(shape, shape).compile()
  assert hlo.traffic(program.as_text()) == 3 * 4 * 64 * 64
