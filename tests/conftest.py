"""Settings of the whole suite, and the fixtures that several files share."""

import functools
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

# Compiling is most of what the suite does. What one test has compiled no later test of its process
# compiles again, nor a program that it starts. A worker of pytest-xdist has a folder of its own:
# JAX does not lock entries while it writes them.
os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="mora_jax_tests_")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
# The optimised HLO stays the same to the byte, and with it FLOPs, memory and collectives; LLVM
# alone does less. What that may hide is what the fixture `optimized` is for.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Workers share the cores, where OpenBLAS would take every one for each of them and wait in a loop.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import mora_jax

GOLDEN = pathlib.Path(__file__).parent / "golden"

SCHEMES = [
    mora_jax.Sharing(),
    mora_jax.Sharing("contiguous", "contiguous"),
    mora_jax.Sharing("contiguous", "stride"),
    mora_jax.Sharing("stride", "contiguous"),
    mora_jax.Sharing(shift=3),
    mora_jax.Sharing(signs=3),
    mora_jax.Sharing(shift=1, signs=2),
    mora_jax.Rotation(),
    mora_jax.Rotation(wrap=True),
    mora_jax.Decoupling(),
    mora_jax.Decoupling(wrap=True),
    mora_jax.Truncation(),
]
ALL_SCHEMES = [*SCHEMES, mora_jax.LowRank(alpha=3.0)]


def pytest_unconfigure():
    shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


@pytest.fixture
def float64():
    """Double precision inside a test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def optimized():
    """Machine code as users get it, for what is compared bit by bit.

    LLVM joins a product and a sum into one instruction that rounds once, here and not there.
    """
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def strict():
    """No implicit promotion of dtypes or ranks inside a test."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


def golden_operators():
    """The cases of golden/operators.npz, as pytest params of (case, arrays)."""
    with np.load(GOLDEN / "operators.npz", allow_pickle=False) as file:
        arrays = dict(file)
    params = []
    for case in json.loads(str(arrays["index"])):
        prefix = case["name"] + "/"
        own = {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
        params.append(pytest.param(case, own, id=case["name"]))
    return params


def random_adapter(in_features, out_features, rank, scheme, seed=0, dtype="float32", batch=()):
    """An adapter of normal random numbers."""
    rng = np.random.default_rng(seed)
    leaves = scheme.leaves(in_features, out_features, scheme.size(in_features, out_features, rank))
    return {
        name: jnp.asarray(rng.standard_normal((*batch, *leaf.shape)), dtype)
        for name, leaf in leaves.items()
    }


def perturb(tree, seed=0, scale=0.1):
    """The tree with normal random numbers added to its leaves."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: leaf + jnp.asarray(scale * rng.standard_normal(leaf.shape), leaf.dtype), tree
    )


def assert_same_bits(first, second):
    """Equal structures, dtypes and bits: -0.0 is not 0.0, and a NaN equals itself."""
    assert jax.tree.structure(first) == jax.tree.structure(second)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


class Block(nn.Module):
    """Two layers of different width, and a residual."""

    @nn.compact
    def __call__(self, x, _=None):
        y = nn.gelu(nn.Dense(24, name="up", dtype=x.dtype)(x))
        return x + nn.Dense(x.shape[-1], name="down", dtype=x.dtype)(y), None


class Network(nn.Module):
    """A little of everything: a Dense, stacked layers, attention, a norm."""

    stacked: bool = True

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(16, name="embed", dtype=x.dtype)(x)
        if self.stacked:
            layers = nn.scan(
                nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=3
            )
            x, _ = layers(name="layers")(x, None)
        x = nn.LayerNorm(name="norm", dtype=x.dtype)(x)
        return nn.MultiHeadDotProductAttention(2, name="attention", dtype=x.dtype)(x, x)


class Small(nn.Module):
    """Two layers and a norm: quick to compile, for what does not depend on the model."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(16, name="embed", dtype=x.dtype)(x)
        x = nn.LayerNorm(name="norm", dtype=x.dtype)(x)
        return nn.Dense(12, name="head", dtype=x.dtype)(x)


def run_on_eight_devices(program):
    """What a program of this folder prints as JSON, in a process of eight CPU devices."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    command = [sys.executable, "-W", "error", pathlib.Path(__file__).with_name(program)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


#: One scheme of each family, for tests that compile a whole model.
FAMILIES = [
    mora_jax.Sharing("contiguous", "stride"),
    mora_jax.Sharing(shift=1, signs=2),
    mora_jax.Rotation(wrap=True),
    mora_jax.Truncation(),
    mora_jax.LowRank(alpha=3.0),
]


@pytest.fixture
def inputs():
    return jax.random.normal(jax.random.key(1), (2, 5, 10))


@functools.cache
def initialized(module, shape, dtype):
    """New parameters as NumPy arrays, which no test can donate: most want the same ones."""
    params = jax.jit(module.init)(jax.random.key(0), jnp.ones(shape, dtype))["params"]
    return jax.device_get(params)


def adapted_network(inputs, *, key=None, module=None, **config):
    """(base model, its params, adapted model, plan, params with new adapters)."""
    base = module or Network()
    pretrained = jax.tree.map(jnp.array, initialized(base, inputs.shape, inputs.dtype))
    model = mora_jax.adapt(base, mora_jax.MoRAConfig(**{"rank": 2, **config}))
    plan = mora_jax.plan(model, inputs)
    return base, pretrained, model, plan, mora_jax.attach(plan, pretrained, key=key)
