"""Loaded adapters are float32, so that they train on; plan and leaves agree."""

import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from safetensors.numpy import save_file

import mora_jax
from helpers.arrays import assert_same_bits
from mora_jax import checkpoint, peft

NAMES = [peft.KernelName("kernel", "fc")]
BASE = {"kernel": jnp.zeros((8, 6))}


def save_peft(folder, a_dtype, b_dtype):
    rng = np.random.default_rng(0)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["fc"]}
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    prefix = "base_model.model.fc.lora_"
    a, b = rng.standard_normal((2, 8)), rng.standard_normal((6, 2))
    tensors = {
        f"{prefix}A.weight": a.astype(jnp.dtype(a_dtype)),
        f"{prefix}B.weight": b.astype(jnp.dtype(b_dtype)),
    }
    save_file(tensors, folder / "adapter_model.safetensors")


def save_checkpoint(folder, dtype):
    model = mora_jax.adapt(
        nn.Dense(6, use_bias=False),
        mora_jax.MoRAConfig(rank=2, scheme=mora_jax.LowRank(4.0), dtype=dtype),
    )
    plan = mora_jax.plan(model, jax.ShapeDtypeStruct((1, 8), "float32"))
    params = mora_jax.attach(plan, BASE, key=jax.random.key(0))
    checkpoint.save_adapters(folder, params, plan)
    return params


def dtypes_of(params, plan):
    """Dtypes of the leaves, and of the plan."""
    trained, _ = mora_jax.split(params, plan)
    leaves = {leaf.dtype.name for leaf in jax.tree.leaves(trained)}
    return leaves, {spec.config.dtype for spec in plan.values()}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_peft_file_comes_in_float32(tmp_path, dtype, caplog):
    save_peft(tmp_path / "adapter", dtype, dtype)
    caplog.set_level(logging.INFO, logger="mora_jax")
    wide = peft.load_adapters(tmp_path / "adapter", BASE, names=NAMES)
    assert dtypes_of(*wide) == ({"float32"}, {"float32"})
    assert [dtype in text for text in caplog.messages] == [True] * (dtype != "float32")
    own = peft.load_adapters(tmp_path / "adapter", BASE, names=NAMES, dtype=None)
    assert dtypes_of(*own) == ({dtype}, {dtype})
    assert_same_bits(jax.tree.map(lambda leaf: leaf.astype("float32"), own[0]), wide[0])


@pytest.mark.parametrize("dtype", ["float32", None])
def test_tensors_of_two_dtypes_are_no_adapter(tmp_path, dtype):
    save_peft(tmp_path / "adapter", "bfloat16", "float32")
    with pytest.raises(ValueError, match="tensors differ in dtype"):
        peft.load_adapters(tmp_path / "adapter", BASE, names=NAMES, dtype=dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_checkpoint_comes_in_float32(tmp_path, dtype, caplog):
    params = save_checkpoint(tmp_path / "adapter", dtype)
    caplog.set_level(logging.INFO, logger="mora_jax")
    wide = checkpoint.load_adapters(tmp_path / "adapter", BASE)
    assert dtypes_of(*wide) == ({"float32"}, {"float32"})
    assert sum("dtype=None" in text for text in caplog.messages) == 1
    own = checkpoint.load_adapters(tmp_path / "adapter", BASE, dtype=None)
    assert dtypes_of(*own) == ({dtype}, {dtype})
    assert_same_bits(own[0], params)
    assert_same_bits(jax.tree.map(lambda leaf: leaf.astype("float32"), params), wide[0])


def test_nothing_is_narrowed_and_a_dtype_is_floating(tmp_path):
    save_checkpoint(tmp_path / "adapter", "float32")
    loaded = checkpoint.load_adapters(tmp_path / "adapter", BASE, dtype="bfloat16")
    assert dtypes_of(*loaded) == ({"float32"}, {"float32"})
    with pytest.raises(TypeError, match=r"dtype must be floating.*'int32'"):
        checkpoint.load_adapters(tmp_path / "adapter", BASE, dtype="int32")
