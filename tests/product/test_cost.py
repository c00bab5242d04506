"""`placement="auto"`: which place it takes for which shapes, on which machine."""

import jax
import pytest

import mora_jax
from helpers.schemes import SCHEMES
from mora_jax._product.cost import Splits, cheapest_placements


def places(rows, in_features, out_features, scheme, machine, rank=8):
    size = mora_jax.square_rank(in_features, out_features, rank, scheme)
    return cheapest_placements(rows, in_features, out_features, size, scheme, machine)


@pytest.mark.parametrize("machine", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_auto_takes_the_kernel_for_many_rows(machine, scheme):
    assert places(10**6, 4096, 4096, scheme, machine) == ("kernel", "kernel")
    assert places(1, 4096, 4096, scheme, machine) == ("activation", "activation")
    assert places(10**6, 4096, 4096, mora_jax.LowRank(), machine)[0] == "activation"


def test_auto_may_split_the_passes():
    # A wide layer has many outputs to add to, and few inputs.
    assert places(5000, 4096, 14336, mora_jax.Sharing(), "gpu") == ("kernel", "activation")
    assert places(5000, 14336, 4096, mora_jax.Sharing(), "gpu") == ("activation", "kernel")


def test_a_table_makes_the_kernels_sum_dear():
    # Where the compiler's estimates for one v5p cross: near 16,384 rows.
    assert places(8192, 4096, 14336, mora_jax.Sharing(), "gpu")[0] == "kernel"
    assert places(8192, 4096, 14336, mora_jax.Sharing(), "tpu")[0] == "activation"
    assert places(65536, 4096, 14336, mora_jax.Sharing(), "tpu") == ("kernel", "kernel")


@pytest.mark.parametrize(("machine", "place"), [("gpu", "kernel"), ("tpu", "activation")])
def test_auto_goes_by_the_mesh_that_is_compiled_for(machine, place):
    device = jax.sharding.AbstractDevice(device_kind="any", num_cores=None, platform=machine)
    mesh = jax.sharding.AbstractMesh((8,), ("d",), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        assert places(200, 1024, 1024, mora_jax.Sharing(), None) == (place, place)


def test_split_kernels_are_cheap_and_split_features_dear():
    # A layer of Llama-3-8B on a pod of TPUs, fsdp 16 x tensor 4, 1,024 rows a chip.
    size, sharing = 256, mora_jax.Sharing()
    shapes = (1024, 4096, 4096, size, sharing, "tpu")
    assert cheapest_placements(*shapes) == ("activation", "activation")
    assert cheapest_placements(*shapes, Splits(1, 4, 64)) == ("kernel", "kernel")
    # Decoding a few tokens is another matter.
    few = (8, 4096, 4096, size, sharing, "gpu")
    assert cheapest_placements(*few, Splits(1, 4, 4)) == ("kernel", "kernel")
    wide = (8, 8192, 28672, 544, sharing, "gpu")
    assert cheapest_placements(*wide, Splits(1, 4, 4)) == ("activation", "activation")
