"""The limit: clip and Adam at the speed of memory, 32 bytes a parameter, whatever the number of arrays."""

import ctypes
import math
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from workers import Contender

__all__ = ["limit_step"]

BYTES = 32  # read g for the norm; read g, m, v, p; write m, v, p
FLAGS = ["-O3", "-march=native", "-ffast-math", "-shared", "-fPIC", "-pthread"]
RATE = 1e-3

Array: TypeAlias = np.ndarray[Any, np.dtype[np.float32]]
Step: TypeAlias = Callable[[], object]

SOURCE = r"""
#include <math.h>
#include <pthread.h>
#include <stddef.h>

enum { LANES = 64 };

typedef struct { size_t arrays; const size_t *sizes; float **g, **m, **v, **p; } Model;
typedef struct { const Model *model; size_t begin, end; float factor, rate; double sum; } Part;

static double sum_of_squares(const float *g, size_t n) {
    float lanes[LANES] = {0};
    double sum = 0;
    size_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int k = 0; k < LANES; k++) lanes[k] += g[i + k] * g[i + k];
    for (; i < n; i++) sum += g[i] * g[i];
    for (int k = 0; k < LANES; k++) sum += lanes[k];
    return sum;
}

static void adam(const float *restrict g, float *restrict m, float *restrict v, float *restrict p, size_t n,
                 float factor, float rate) {
    for (size_t i = 0; i < n; i++) {
        float clipped = g[i] * factor;
        m[i] += 0.1f * (clipped - m[i]);
        v[i] += 0.001f * (clipped * clipped - v[i]);
        p[i] -= rate * m[i] / (sqrtf(v[i]) + 1e-8f);
    }
}

/* A part is a range of the numbers of all arrays one after the other. */
static void walk(Part *part, int update) {
    const Model *model = part->model;
    size_t start = 0;
    for (size_t a = 0; a < model->arrays && start < part->end; start += model->sizes[a++]) {
        size_t stop = start + model->sizes[a];
        if (stop <= part->begin) continue;
        size_t from = (part->begin > start ? part->begin : start) - start;
        size_t n = (part->end < stop ? part->end : stop) - start - from;
        if (update)
            adam(model->g[a] + from, model->m[a] + from, model->v[a] + from, model->p[a] + from, n, part->factor,
                 part->rate);
        else
            part->sum += sum_of_squares(model->g[a] + from, n);
    }
}

static void *norm_part(void *part) { walk(part, 0); return NULL; }
static void *update_part(void *part) { walk(part, 1); return NULL; }

static void pass(void *(*function)(void *), Part *parts, size_t threads) {
    pthread_t others[threads];
    for (size_t t = 1; t < threads; t++) pthread_create(&others[t], NULL, function, &parts[t]);
    function(&parts[0]);
    for (size_t t = 1; t < threads; t++) pthread_join(others[t], NULL);
}

void step(size_t threads, size_t arrays, const size_t *sizes, float **g, float **m, float **v, float **p, float rate) {
    Model model = {arrays, sizes, g, m, v, p};
    Part parts[threads];
    size_t total = 0;
    double sum = 0;
    for (size_t a = 0; a < arrays; a++) total += sizes[a];
    for (size_t t = 0; t < threads; t++)
        parts[t] = (Part){&model, total * t / threads, total * (t + 1) / threads, 1, rate, 0};
    pass(norm_part, parts, threads);
    for (size_t t = 0; t < threads; t++) sum += parts[t].sum;
    for (size_t t = 0; t < threads; t++) parts[t].factor = sum > 1 ? 1 / sqrt(sum) : 1;
    pass(update_part, parts, threads);
}
"""


def limit_step(shapes: Sequence[tuple[int, ...]]) -> Contender:
    """The limit on what JAX runs on: a C kernel, NumPy without a compiler, the bandwidth on an accelerator."""
    sizes = [math.prod(shape) for shape in shapes]
    if jax.default_backend() != "cpu":
        return bandwidth(sum(sizes))
    generator = np.random.default_rng(0)
    gradients = [generator.standard_normal(size, dtype=np.float32) for size in sizes]
    columns = [gradients, *([np.zeros(size, np.float32) for size in sizes] for _ in range(3))]
    threads = os.cpu_count() or 1
    for compiler in filter(None, map(shutil.which, ("cc", "gcc", "clang"))):
        step = c_step(compiler, columns, threads)
        if step is not None:
            return Contender(step, note=f"a C kernel on {threads} threads, {BYTES} bytes a parameter")
    return Contender(numpy_step(columns), note="NumPy, for want of a C compiler: slower than memory")


def c_step(compiler: str, columns: Sequence[Sequence[Array]], threads: int) -> Step | None:
    """A step over gradients, both moments and parameters, in C; None where the compiler will not."""
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "limit.c"), Path(folder, "limit.so")
        source.write_text(SOURCE)
        command = [compiler, *FLAGS, "-o", str(library), str(source), "-lm"]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            return None
        function = ctypes.CDLL(str(library)).step
    count = len(columns[0])
    sizes = (ctypes.c_size_t * count)(*(array.size for array in columns[0]))
    pointers = [(ctypes.c_void_p * count)(*(array.ctypes.data for array in column)) for column in columns]

    def step() -> None:
        assert columns  # held here, since a pointer keeps no array alive
        function(ctypes.c_size_t(threads), ctypes.c_size_t(count), sizes, *pointers, ctypes.c_float(RATE))

    return step


def numpy_step(columns: Sequence[Sequence[Array]], block: int = 1 << 16) -> Step:
    """The same step in NumPy, in blocks that stay in the cache."""

    def step() -> None:
        norm = math.sqrt(sum(float(np.vdot(g, g)) for g in columns[0]))
        factor = np.float32(1 / norm if norm > 1 else 1)
        for arrays in zip(*columns, strict=True):
            for start in range(0, arrays[0].size, block):
                g, m, v, p = (array[start : start + block] for array in arrays)
                clipped = g * factor
                m += np.float32(0.1) * (clipped - m)
                v += np.float32(0.001) * (clipped * clipped - v)
                p -= np.float32(RATE) * m / (np.sqrt(v) + np.float32(1e-8))

    return step


def bandwidth(size: int) -> Contender:
    """What the device's bandwidth, as a sum in place shows it, makes of the limit's bytes."""
    add = jax.jit(lambda a, b: a + b, donate_argnums=0)
    carry, other = jnp.zeros(size), jnp.ones(size)

    def step() -> None:
        nonlocal carry
        carry = jax.block_until_ready(add(carry, other))

    note = f"the bandwidth of {jax.devices()[0].device_kind}, {BYTES} bytes a parameter"
    return Contender(step, repeats=3 * carry.itemsize / BYTES, note=note)
