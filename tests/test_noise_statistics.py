"""Gradient noise as random numbers: 1e8 draws against the closed forms, and no stream that knows another.

Seeds are fixed, so that no test here is flaky. Thresholds are in standard errors: 5 where tens of numbers are compared
(one false alarm in 1e5 changes of the generator), 6 where tens of thousands are.
"""

from itertools import combinations
from math import sqrt
from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_noise import draw

import optloss

CHUNK, CHUNKS = 10_000_000, 10
STREAM = 100_000
NORMAL = NormalDist()
INSIDE = NORMAL.cdf(2.0) - NORMAL.cdf(-2.0)
BASE_KEY = 0x0123_4567_89AB_CDEF

Array = np.ndarray


def moment(power: int) -> float:
    """E x**power of N(0, 1) cut at two, by parts: m_k = (k - 1) m_(k-2) - 2 * 2**(k-1) phi(2) / P(|x| < 2)."""
    if power % 2:
        return 0.0
    return 1.0 if power == 0 else (power - 1) * moment(power - 2) - 2.0**power * NORMAL.pdf(2.0) / INSIDE


def quantile(probability: float) -> float:
    return NORMAL.inv_cdf(NORMAL.cdf(-2.0) + probability * INSIDE)


def standardised(sample: Array) -> tuple[Array, Array]:
    """The draws and their squares, each of mean 0 and variance 1 in theory."""
    x = sample.astype(np.float64)
    return x / sqrt(moment(2)), (x**2 - moment(2)) / sqrt(moment(4) - moment(2) ** 2)


def correlation_errors(x: Array, y: Array) -> list[float]:
    """Correlations of two samples, of their squares and of their signs, in standard errors."""
    (x1, x2), (y1, y2) = standardised(x), standardised(y)
    return [float(np.dot(a, b)) / sqrt(x.size) for a, b in ((x1, y1), (x2, y2), (np.sign(x1), np.sign(y1)))]


def draw_at(step: int, count: int = STREAM) -> Array:
    """The noise of a parameter at any step, without the steps before it."""
    stage = optloss.add_gradient_noise(1.0, BASE_KEY)
    zeros = {"w": jnp.zeros(count)}
    state = stage.init(zeros)._replace(step=jnp.int32(step))
    return np.asarray(jax.device_get(stage.update(zeros, state)[0]["w"]))


@pytest.fixture(scope="module")
def chunks() -> list[Array]:
    return [np.asarray(noise["w"]) for noise in draw(["w"], (CHUNK,), steps=CHUNKS)]


@pytest.mark.slow
def test_the_moments_are_those_of_a_truncated_normal(chunks: list[Array]) -> None:
    """Mean, variance, skewness and kurtosis are the first four; sampling gives the k-th (m_2k - m_k**2) / n."""
    total, powers = CHUNK * CHUNKS, range(1, 9)
    sums = np.zeros(len(powers))
    for chunk in chunks:
        x = chunk.astype(np.float64)
        assert np.abs(x).max() <= 2.0 + 1e-6
        product = np.ones_like(x)
        for k in range(len(powers)):
            product *= x
            sums[k] += product.sum()
    for power, mean in zip(powers, sums / total, strict=True):
        error = sqrt((moment(2 * power) - moment(power) ** 2) / total)
        assert abs(mean - moment(power)) < 5 * error, power


@pytest.mark.slow
def test_the_distribution_function_is_that_of_a_truncated_normal(chunks: list[Array]) -> None:
    """Counts below 1023 quantiles: each one, the largest distance (Kolmogorov-Smirnov), and chi-square of the bins."""
    total, bins = CHUNK * CHUNKS, 1024
    p = np.arange(1, bins) / bins
    edges = np.array([quantile(q) for q in p])
    below = np.zeros(bins - 1)
    for chunk in chunks:
        below += np.searchsorted(np.sort(chunk), edges)
    distance = np.abs(below / total - p)
    assert np.all(distance < 6 * np.sqrt(p * (1 - p) / total))
    assert sqrt(total) * distance.max() < 2.5  # P(larger) = 2 exp(-2 * 2.5**2) = 7e-6
    counts = np.diff(below, prepend=0, append=total)
    chi_square = np.sum((counts - total / bins) ** 2) * bins / total
    assert abs(chi_square - (bins - 1)) < 5 * sqrt(2 * (bins - 1))


@pytest.mark.slow
def test_the_tails_are_those_of_a_truncated_normal(chunks: list[Array]) -> None:
    """The outermost 1e-6 to 1e-3 on either side, where a coarse draw or a poor inverse shows first."""
    total = CHUNK * CHUNKS
    for p in (1e-6, 1e-5, 1e-4, 1e-3):
        for side in (-1, 1):
            count = sum(int(np.count_nonzero(side * chunk > -quantile(p))) for chunk in chunks)
            # A float32 near 2 is 2.4e-7 wide, and a density of 0.057 makes that 1.4e-8 of all draws.
            assert abs(count - p * total) < 5 * sqrt(p * total) + 1.4e-8 * total, (p, side)


@pytest.mark.slow
def test_elements_of_one_draw_are_uncorrelated_at_any_distance(chunks: list[Array]) -> None:
    """Neighbours, the rows of common layer widths, and powers of two, which counters fail first."""
    lags = [*range(1, 17), 31, 32, 33, 63, 64, 65, 127, 128, 256, 512, 768, 1000, 1024, 3072, 4096, 65536, 2**20]
    sums = np.zeros((2, len(lags)))
    for chunk in chunks:
        for row, x in enumerate(standardised(chunk)):
            sums[row] += [np.dot(x[:-lag], x[lag:]) / sqrt(x.size - lag) for lag in lags]
    assert np.abs(sums).max() < 5 * sqrt(CHUNKS)


@pytest.mark.slow
def test_the_sign_changes_as_often_as_a_coin_and_a_third_of_triples_are_monotone(chunks: list[Array]) -> None:
    """Two runs tests. Of n - 2 triples 2/3 turn, with variance (16 n - 29) / 90 (Bienayme)."""
    changes = turns = 0
    for x in chunks:
        changes += int(np.count_nonzero(np.signbit(x[1:]) != np.signbit(x[:-1])))
        rises, falls = x[1:] > x[:-1], x[1:] < x[:-1]
        turns += int(np.count_nonzero((rises[:-1] & falls[1:]) | (falls[:-1] & rises[1:])))
    total = CHUNK * CHUNKS
    assert abs(changes - (total - CHUNKS) / 2) < 5 * sqrt(total / 4)
    # A draw has about 2**24 values: one pair in 2**23 is a tie, and turns nothing.
    assert abs(turns - 2 / 3 * (total - 2 * CHUNKS)) < 5 * sqrt(16 * total / 90) + total / 2**22


@pytest.mark.slow
def test_the_spectrum_is_flat(chunks: list[Array]) -> None:
    """Power of 2**16 draws, averaged over all of them: gamma, so a normal's error with a little more tail."""
    size = 2**16
    power, blocks = np.zeros(size // 2 - 1), 0
    for chunk in chunks:
        x = standardised(chunk)[0]
        rows = x[: x.size // size * size].reshape(-1, size)
        power += np.sum(np.abs(np.fft.rfft(rows)[:, 1:-1]) ** 2, axis=0) / size
        blocks += len(rows)
    assert np.abs(power / blocks - 1).max() < 6.5 / sqrt(blocks)


@pytest.mark.slow
def test_leaves_steps_and_keys_are_uncorrelated_over_ten_million_draws() -> None:
    first, second = draw(["a", "b"], (CHUNK,), steps=2)
    (other_key,) = draw(["a", "b"], (CHUNK,), key=1)
    samples = [first["a"], first["b"], second["a"], second["b"], other_key["a"], other_key["b"]]
    for x, y in combinations(samples, 2):
        assert max(map(abs, correlation_errors(x, y))) < 5
        # Nor is one of them the other moved along.
        assert max(map(abs, correlation_errors(x[1:], y[:-1]))) < 5


@pytest.mark.slow
def test_no_two_of_many_streams_are_correlated() -> None:
    """Names and keys that differ little, and successive steps: 512 streams, 130816 pairs."""
    names = ["w", "v", "ww", "b", "a/w", "a/b", "layer_1/kernel", "layer_2/kernel"]
    streams = [
        noise[name]
        for key in (0, 1, 2, 3, 2**31, 2**32, 2**63, 2**64 - 1)
        for noise in draw(names, (STREAM,), key=key, steps=8)
        for name in names
    ]
    upper = np.triu_indices(len(streams), 1)
    for kind in (0, 1):
        rows = np.stack([standardised(stream)[kind] for stream in streams])
        errors = (rows @ rows.T)[upper] / sqrt(STREAM)
        assert np.abs(errors).max() < 6
        # And together: the mean square of k standard normals is 1 with a variance of 2 / k.
        assert abs(np.mean(errors**2) - 1) < 5 * sqrt(2 / errors.size)


@pytest.mark.slow
@pytest.mark.parametrize("flipped", range(64))
def test_one_bit_of_the_key_changes_the_whole_draw(flipped: int) -> None:
    """Half of the signs change, and the values know nothing of each other."""
    (before,), (after,) = (draw(["w"], (STREAM,), key=key) for key in (BASE_KEY, BASE_KEY ^ (1 << flipped)))
    assert max(map(abs, correlation_errors(before["w"], after["w"]))) < 5


@pytest.mark.slow
@pytest.mark.parametrize("flipped", range(31))
def test_one_bit_of_the_step_changes_the_whole_draw(flipped: int) -> None:
    base = 0x2468_ACE1
    assert max(map(abs, correlation_errors(draw_at(base), draw_at(base ^ (1 << flipped))))) < 5


@pytest.mark.slow
def test_the_sign_of_each_element_is_a_coin_over_the_bits_of_the_key() -> None:
    """An element that no bit of the key moves would hide in the sums over elements: 64 flips, 2048 elements."""
    elements, bases = 2048, 8
    changes = np.zeros((64, elements))
    for base in range(bases):
        key = BASE_KEY + base * 0x9E37_79B9
        (before,) = draw(["w"], (elements,), key=key)
        for flipped in range(64):
            (after,) = draw(["w"], (elements,), key=key ^ (1 << flipped))
            changes[flipped] += np.signbit(before["w"]) != np.signbit(after["w"])
    for axis, count in ((0, 64 * bases), (1, elements * bases)):
        errors = (changes.sum(axis=axis) - count / 2) / sqrt(count / 4)
        assert np.abs(errors).max() < 6
