"""Adapters on disk."""

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from orbax.checkpoint import v1 as ocp

import mora_jax
from conftest import Network, adapted_network, assert_same_bits, perturb
from mora_jax import checkpoint


@pytest.mark.parametrize("scheme", ["sharing", "rotation", "low_rank"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_travel(tmp_path, inputs, scheme, dtype):
    _, pretrained, _, plan, params = adapted_network(
        inputs, scheme=scheme, dtype=dtype, also_train="norm/.*", key=jax.random.key(3)
    )
    trainable, frozen = mora_jax.split(params, plan)
    params = mora_jax.join(perturb(trainable), frozen)
    checkpoint.save_adapters(tmp_path / "adapters", params, plan)
    loaded, loaded_plan = checkpoint.load_adapters(tmp_path / "adapters", pretrained)
    assert loaded_plan == plan
    assert_same_bits(loaded, params)


def test_an_adapter_in_mid_cycle_knows_its_scheme(tmp_path, inputs):
    _, _, _, plan, params = adapted_network(inputs, scheme="sharing")
    params, _, plan, _ = mora_jax.merge_and_reset(params, (), plan)
    checkpoint.save_adapters(tmp_path / "adapters", params, plan)
    base = mora_jax.merge(params, plan)
    _, loaded_plan = checkpoint.load_adapters(tmp_path / "adapters", base)
    assert loaded_plan["embed"].scheme == mora_jax.Sharing(signs=1)


def test_the_base_is_not_written(tmp_path):
    inputs = jnp.ones((1, 512))
    module = nn.Dense(512)
    *_, plan, params = adapted_network(inputs, module=module, scheme="sharing")
    checkpoint.save_adapters(tmp_path / "adapters", params, plan)
    size = sum(file.stat().st_size for file in (tmp_path / "adapters").rglob("*"))
    assert params["kernel"].nbytes == 2**20
    assert size < 2**17


def test_what_does_not_fit_is_refused(tmp_path, inputs):
    base, pretrained, _, plan, params = adapted_network(inputs, scheme="sharing")
    path = tmp_path / "adapters"
    checkpoint.save_adapters(path, params, plan)
    with pytest.raises(ValueError, match="exists already"):
        checkpoint.save_adapters(path, params, plan)
    with pytest.raises(FileNotFoundError, match="no adapters at"):
        checkpoint.load_adapters(tmp_path / "nowhere", pretrained)
    wide = base.init(jax.random.key(0), jnp.ones((2, 5, 11)))["params"]
    with pytest.raises(ValueError, match=r"'embed/kernel' has shape \(11, 16\).*\(10, 16\)"):
        checkpoint.load_adapters(path, wide)
    with pytest.raises(ValueError, match="have adapters already"):
        checkpoint.load_adapters(path, params)
    other = Network(stacked=False).init(jax.random.key(0), inputs)["params"]
    with pytest.raises(ValueError, match=r"no parameter at 'layers/down/kernel'"):
        checkpoint.load_adapters(path, other)
    ocp.save(tmp_path / "something", {"a": jnp.ones(3)})
    with pytest.raises(ValueError, match="not one of save_adapters: no plan"):
        checkpoint.load_adapters(tmp_path / "something", pretrained)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no adapter saved by save_adapters"):
        checkpoint.load_adapters(tmp_path / "empty", pretrained)


def test_a_checkpoint_that_disagrees_with_its_plan_is_refused(tmp_path, inputs):
    _, pretrained, _, plan, params = adapted_network(inputs, scheme="sharing")
    trainable, _ = mora_jax.split(params, plan)
    metadata = {"mora_jax_plan": plan.to_json()}
    trainable["embed"]["mora"]["matrix"] = jnp.ones((8, 8))
    ocp.save(tmp_path / "shape", trainable, custom_metadata=metadata)
    with pytest.raises(ValueError, match=r"'embed/mora/matrix' was saved with shape \(8, 8\)"):
        checkpoint.load_adapters(tmp_path / "shape", pretrained)
    del trainable["embed"]
    ocp.save(tmp_path / "missing", trainable, custom_metadata=metadata)
    with pytest.raises(ValueError, match="missing 'embed/mora/matrix', surplus none"):
        checkpoint.load_adapters(tmp_path / "missing", pretrained)
