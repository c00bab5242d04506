"""Settings of the whole suite, and the fixtures that several files share."""

import os
import shutil
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
import pytest

pytest.register_assert_rewrite("helpers")


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


@pytest.fixture
def inputs():
    return jax.random.normal(jax.random.key(1), (2, 5, 10))
