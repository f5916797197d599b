"""The histogram's counts against NumPy's search, whatever the values, the dtype, the shape and the devices."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import enable_x64
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import optloss
from optloss import _histogram as module

LIMITS = module._bucket_limits()
RNG = np.random.default_rng(0)
INF = np.float32(np.inf)


def ordered(values: np.ndarray) -> np.ndarray:
    """Integers in the order of float32s: where a thread flushes subnormals, comparing floats would make them 0."""
    bits = np.asarray(values, np.float32).view(np.int32).astype(np.int64)
    return np.where(bits < 0, -(bits & 0x7FFFFFFF), bits)


def expected(values: Any) -> np.ndarray:
    """NumPy's counts: the bucket that ends past the value; the last has its own end."""
    flat = np.asarray(values)
    flat = flat.astype(np.result_type(flat.dtype, np.float32) if flat.dtype.kind == "f" else np.float32).ravel()
    with np.errstate(over="ignore"):
        flat = flat[np.isfinite(flat)].astype(np.float32)
    places = np.searchsorted(ordered(LIMITS), ordered(flat), side="right")
    return np.bincount(np.minimum(places, 1550), minlength=1551)


def check(h: Any, values: Any) -> None:
    np.testing.assert_array_equal(h.bucket, expected(values))
    flat = np.asarray(values).astype(np.float64).ravel()
    flat = flat[np.isfinite(flat)]
    assert int(h.num) == flat.size
    assert float(h.min) == np.min(flat.astype(np.float32), initial=INF)
    assert float(h.max) == np.max(flat.astype(np.float32), initial=-INF)
    size = np.abs(flat).sum()
    assert abs(float(h.sum) - flat.sum()) <= 1e-6 * size
    np.testing.assert_allclose(h.sum_squares, (flat**2).sum(), rtol=1e-6)
    assert [a.dtype for a in h] == [np.float32, np.float32, np.int32, *[np.float32] * 3, np.int32]
    np.testing.assert_array_equal(h.bucket_limit, LIMITS)


def test_each_limit_and_its_neighbours_are_in_their_buckets() -> None:
    with np.errstate(over="ignore"):
        values = np.concatenate([LIMITS, np.nextafter(LIMITS, INF), np.nextafter(LIMITS, -INF)])
    np.testing.assert_array_equal(optloss.histogram(jnp.asarray(values)).bucket, expected(values))


@pytest.mark.parametrize(
    "value", [0.0, -0.0, 1e-45, -1e-45, 1.1e-38, -1.1e-38, 3.4e38, -3.4e38, np.inf, -np.inf, np.nan]
)
def test_odd_values_are_in_their_buckets(value: float) -> None:
    values = np.full(3, value, np.float32)
    np.testing.assert_array_equal(optloss.histogram(jnp.asarray(values)).bucket, expected(values))


def test_each_cell_ends_in_the_right_bucket() -> None:
    """Between its ends and the limits, where another test looks, a cell's bucket cannot change: it is monotone."""
    starts = np.arange(0, 2**32, 2**19, dtype=np.uint64).astype(np.uint32)
    values = np.concatenate([starts - 1, starts, starts + 1]).view(np.float32)
    np.testing.assert_array_equal(optloss.histogram(jnp.asarray(values)).bucket, expected(values))


@pytest.mark.slow
def test_four_million_bit_patterns_are_in_their_buckets() -> None:
    values = np.arange(0, 2**32, 997, dtype=np.uint64).astype(np.uint32).view(np.float32)
    h = optloss.histogram(jnp.asarray(values))
    np.testing.assert_array_equal(h.bucket, expected(values))
    assert int(h.num) == np.isfinite(values).sum()


B = module._BLOCK


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (1,), (7, 11, 13)])
@pytest.mark.parametrize("broken", [False, True])
@pytest.mark.parametrize("jit", [False, True])
def test_any_shape_is_counted(shape: tuple[int, ...], broken: bool, jit: bool) -> None:
    values = np.asarray(RNG.standard_normal(shape) * 1e-3, np.float32)
    if broken:
        values = np.where(RNG.random(shape) < 1e-2, RNG.choice(np.float32([np.nan, INF, -INF]), shape), values)
    check((jax.jit(optloss.histogram) if jit else optloss.histogram)(jnp.asarray(values)), values)


@pytest.mark.parametrize("shape", [(B - 1,), (B,), (B + 1,), (2 * B,), (3, B - 7)])
@pytest.mark.parametrize("broken", [False, True])
def test_the_blocks_of_a_single_cpu_are_counted(
    shape: tuple[int, ...], broken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tests have eight devices, on which no block is made."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    values = np.asarray(RNG.standard_normal(shape) * 1e-3, np.float32)
    if broken:
        values = np.where(RNG.random(shape) < 1e-2, RNG.choice(np.float32([np.nan, INF, -INF]), shape), values)
    check(jax.jit(module._count_on_cpu)(jnp.asarray(values)), values)


def test_all_equal_values_are_one_bucket() -> None:
    values = np.full(3 * B + 5, 0.1, np.float32)
    check(optloss.histogram(jnp.asarray(values)), values)


@pytest.mark.parametrize(
    ("dtype", "x64"),
    [
        *((dtype, x64) for dtype in (jnp.bfloat16, jnp.float16, jnp.float32, jnp.int32) for x64 in (False, True)),
        (jnp.float64, True),
    ],
)
@pytest.mark.parametrize("n", [1000])
def test_any_dtype_is_counted(dtype: Any, x64: bool, n: int) -> None:
    with enable_x64(x64):
        values = jnp.asarray((RNG.standard_normal(n) * 10).astype(dtype))
        check(optloss.histogram(values), values)


def test_a_finite_float64_beyond_float32_is_in_the_last_bucket() -> None:
    with enable_x64(True):
        h = optloss.histogram(jnp.asarray([1e300, np.inf, 1.0], jnp.float64))
    assert (int(h.num), int(h.bucket[-1])) == (2, 1)


@pytest.mark.parametrize("n", [100])
def test_vmap_and_scan_count_as_a_loop_does(n: int) -> None:
    values = (RNG.standard_normal((3, n)) * 1e-3).astype(np.float32)
    values[1, 5] = np.nan
    batched = jax.jit(jax.vmap(optloss.histogram))(jnp.asarray(values))
    _, scanned = jax.lax.scan(lambda c, v: (c, optloss.histogram(v)), 0, jnp.asarray(values))
    for i in range(3):
        check(jax.tree.map(lambda a: a[i], batched), values[i])  # noqa: B023
        check(jax.tree.map(lambda a: a[i], scanned), values[i])  # noqa: B023


SPECS = [("a", "b"), ("b",), (None, "a"), (("a", "b"),), ()]


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=lambda axis: axis.name)
@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("broken", [False, True])
def test_sharded_values_are_counted_where_they_are(axis_type: AxisType, spec: Any, broken: bool) -> None:
    """Only what is as small as the buckets is sent."""
    values = RNG.standard_normal((512, 1024)).astype(np.float32)
    if broken:
        values[3, 4] = np.nan
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(axis_type,) * 2)
    placed = jax.device_put(values, NamedSharding(mesh, PartitionSpec(*spec)))
    check(optloss.histogram(placed), values)
    program = jax.jit(optloss.histogram).lower(placed).compile()
    check(program(placed), values)
    text = program.as_text()
    sent = re.findall(r"= (.*?) (all-reduce|all-gather|all-to-all|collective-[a-z]+|reduce-scatter)(?:-start)?\(", text)
    assert {kind for _, kind in sent} <= {"all-reduce"}
    shapes = {shape for result, _ in sent for shape in re.findall(r"\[([0-9,]*)\]", result)}
    assert shapes <= {"", "1552"}, shapes
    assert bool(sent) == bool(spec)
    assert not re.search(r"\[512,1024\]|\[524288\]", text) or not spec  # no device sees it all


@pytest.mark.parametrize("n", [16])
def test_shard_map_counts_each_part(n: int) -> None:
    mesh = jax.make_mesh((8,), ("a",), axis_types=(AxisType.Auto,))
    values = RNG.standard_normal((8, n)).astype(np.float32)

    def counts(part: jax.Array) -> jax.Array:
        return jax.lax.psum(optloss.histogram(part).bucket, "a")

    spec = PartitionSpec("a")
    got = jax.jit(jax.shard_map(counts, mesh=mesh, in_specs=spec, out_specs=PartitionSpec()))(values)
    np.testing.assert_array_equal(got, expected(values))
