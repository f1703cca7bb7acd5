"""Costs read from the text of compiled programs, against what the programs are known to do."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from regjax import hlo, hlo_costs


def module(function, *arrays):
    return hlo.parse(jax.jit(function).lower(*arrays).compile().as_text())


def test_products_count_as_the_compiler_counts_them():
    def function(a, b, c):
        return jnp.einsum("bij,bjk->bik", a, b) + (a[0] @ c)

    arrays = jnp.ones((3, 8, 5)), jnp.ones((3, 5, 7)), jnp.ones((5, 7))
    assert hlo_costs.flops(module(function, *arrays)) == 2 * (3 * 8 * 5 * 7 + 8 * 5 * 7)


@pytest.mark.parametrize("stride, lhs_dilation, rhs_dilation", [(1, 1, 1), (2, 1, 2), (1, 3, 1)])
def test_convolutions_count_as_the_compiler_counts_them(stride, lhs_dilation, rhs_dilation):
    convolve = functools.partial(
        jax.lax.conv_general_dilated,
        window_strides=(stride, 1),
        padding=((2, 1), (3, 0)),
        lhs_dilation=(lhs_dilation, 1),
        rhs_dilation=(rhs_dilation, 1),
    )
    arrays = jnp.ones((2, 3, 9, 8)), jnp.ones((4, 3, 3, 5))
    compiled = jax.jit(convolve).lower(*arrays).compile()
    counted = hlo_costs.flops(hlo.parse(compiled.as_text()))
    assert counted > 0
    assert counted == compiled.cost_analysis()["flops"]


@pytest.mark.parametrize("length", [1, 2, 7])
def test_a_loop_counts_as_often_as_it_runs(length):
    def function(x, kernels):
        def outer(x, kernel):
            inner = jax.lax.fori_loop(0, 3, lambda _, y: jnp.tanh(y @ kernel), x)
            return inner, None

        return jax.lax.scan(outer, x, kernels)[0]

    found = module(function, jnp.ones((4, 16)), jnp.ones((length, 16, 16)))
    assert hlo_costs.flops(found) == length * 3 * 2 * 4 * 16 * 16


def test_the_gradient_of_a_scan_takes_twice_its_products_more():
    def function(kernels, x):
        return jnp.sum(jax.lax.scan(lambda x, w: (jnp.sin(x @ w), None), x, kernels)[0])

    kernels, x = jnp.ones((5, 32, 32)), jnp.ones((8, 32))
    forward = hlo_costs.flops(module(function, kernels, x))
    # The gradient with respect to `x` of the first layer is not asked for, and still in its loop.
    assert hlo_costs.flops(module(jax.grad(function), kernels, x)) == 3 * forward


def test_a_loop_whose_length_is_unknown_counts_once():
    def function(x, kernel, count):
        return jax.lax.fori_loop(0, count, lambda _, y: y @ kernel, x)

    found = module(function, jnp.ones((4, 16)), jnp.ones((16, 16)), 3)
    assert hlo_costs.flops(found) == 2 * 4 * 16 * 16


def test_traffic_is_what_is_read_and_written():
    size = 1000 * 4
    assert hlo_costs.traffic(module(lambda x, y: jnp.sin(x) * y, *[jnp.ones(1000)] * 2)) == 3 * size


def test_a_slice_is_read_as_a_slice():
    """A scan over stacked kernels reads each once, not the stack at every turn."""

    def function(x, kernels):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, kernels)[0]

    count, width = 50, 128
    found = module(function, jnp.ones((1, width)), jnp.ones((count, width, width)))
    kernels = count * width * width * 4
    # Copies of a slice are written and read again, once each.
    assert kernels <= hlo_costs.traffic(found) < 4 * kernels


TEXT = """HloModule m, num_partitions=8

%step (p: (s32[], f32[16,4])) -> (s32[], f32[16,4]) {{
  %p = (s32[], f32[16,4]{{1,0}}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[16,4]{{1,0}} get-tuple-element(%p), index=1
  %moved = f32[16,4]{{1,0:T(8,128)}} {line}
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  ROOT %out = (s32[], f32[16,4]{{1,0}}) tuple(%next, %x)
}}

%more (q: (s32[], f32[16,4])) -> pred[] {{
  %q = (s32[], f32[16,4]{{1,0}}) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %limit = s32[] constant(6)
  ROOT %less = pred[] compare(%j, %limit), direction=LT
}}

ENTRY %main (a: f32[16,4]) -> f32[16,4] {{
  %a = f32[16,4]{{1,0}} parameter(0)
  %start = s32[] constant(2)
  %state = (s32[], f32[16,4]{{1,0}}) tuple(%start, %a)
  %loop = (s32[], f32[16,4]{{1,0}}) while(%state), condition=%more, body=%step
  ROOT %end = f32[16,4]{{1,0}} get-tuple-element(%loop), index=1
}}
"""
SIZE = 16 * 4 * 4


@pytest.mark.parametrize(
    "line, kind, group, size, sent",
    [
        ("all-reduce(%x), channel_id=1, replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add",
         "all-reduce", 2, SIZE, SIZE),
        ("all-reduce(%x), channel_id=1, replica_groups={}, to_apply=%add",
         "all-reduce", 8, SIZE, SIZE * 14 / 8),
        ("all-gather(%x), replica_groups=[2,4]<=[8], dimensions={0}",
         "all-gather", 4, 4 * SIZE, 3 * SIZE),
        ("all-gather-start(%x), replica_groups=[2,4]<=[8], dimensions={0}",
         "all-gather", 4, 4 * SIZE, 3 * SIZE),
        ("reduce-scatter(%x), replica_groups=mesh['a'=2,'b'=4] {'b'}, to_apply=%add",
         "reduce-scatter", 4, SIZE, SIZE * 3 / 4),
        ("all-to-all(%x), replica_groups=mesh['a'=2,'b'=4] {'a','b'}, dimensions={0}",
         "all-to-all", 8, SIZE, SIZE * 7 / 8),
        ("collective-permute(%x), source_target_pairs={{0,1},{1,2},{2,0}}",
         "collective-permute", 2, SIZE, SIZE),
    ],
)  # fmt: skip
def test_exchanges_by_kind_group_and_size(line, kind, group, size, sent):
    (found,) = hlo_costs.collectives(hlo.parse(TEXT.format(line=line)))
    assert (found.kind, found.group, found.bytes, found.operands) == (
        kind,
        group,
        size,
        ("f32[16,4]",),
    )
    # From 2 to below 6.
    assert found.count == 4
    np.testing.assert_allclose(found.sent, 4 * sent)


def test_a_loop_that_was_unrolled_counts_its_turns():
    """Two sums of one to the counter: from 2 to below 6 in two turns."""
    line = "all-reduce(%x), replica_groups={}, to_apply=%add\n  %half = s32[] add(%i, %one)"
    text = TEXT.format(line=line).replace("%next = s32[] add(%i, %one)", "")
    text = text.replace("%one = s32[] constant(1)", "%next = s32[] add(%half, %one)")
    text = text.replace("%x = f32", "%one = s32[] constant(1)\n  %x = f32", 1)
    (found,) = hlo_costs.collectives(hlo.parse(text))
    assert found.count == 2


def test_exchanges_of_one_device_are_none():
    line = "all-reduce(%x), replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}, to_apply=%add"
    assert hlo_costs.collectives(hlo.parse(TEXT.format(line=line))) == []


def test_fragments_of_one_channel_are_one_exchange():
    line = "all-reduce(%x), channel_id=7, replica_groups={}, to_apply=%add"
    twice = f"{line}\n  %again = f32[16,4]{{1,0}} {line}"
    (found,) = hlo_costs.collectives(hlo.parse(TEXT.format(line=twice)))
    assert found.count == 4


def test_an_exchange_spread_over_a_loop_is_one():
    """It starts before the loop, goes on inside of it and ends after it."""
    fused = "fusion(%{}), kind=kCustom, calls=%part"
    part = """%part (b: f32[16,4]) -> f32[16,4] {{
  %b = f32[16,4]{{1,0}} parameter(0)
  ROOT %sum = f32[16,4]{{1,0}} all-reduce(%b), channel_id=7, replica_groups={{}}, to_apply=%add
}}

"""
    text = TEXT.replace("%step (p:", part + "%step (p:", 1)
    text = text.replace(
        "%start = ", "%begin = f32[16,4]{{1,0}} " + fused.format("a") + "\n  %start = "
    )
    (found,) = hlo_costs.collectives(hlo.parse(text.format(line=fused.format("x"))))
    assert (found.kind, found.count) == ("all-reduce", 1)
