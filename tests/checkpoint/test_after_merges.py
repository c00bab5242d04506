"""Adapters that were trained after a merge belong to the base that it changed."""

import dataclasses
import json

import jax
import numpy as np
import optax
import pytest

import mora_jax
import mora_jax.export
import mora_jax.peft
from helpers.arrays import perturb
from helpers.models import Small, adapted_network
from mora_jax import checkpoint

NAMES = [
    mora_jax.peft.KernelName("embed/kernel", "embed"),
    mora_jax.peft.KernelName("head/kernel", "head"),
    *(mora_jax.export.TensorName(p, p.replace("/", ".")) for p in ("embed/bias", "head/bias")),
    *(mora_jax.export.TensorName(f"norm/{p}", f"norm.{p}") for p in ("scale", "bias")),
]


@pytest.fixture(scope="module")
def trained():
    """(inputs, base model, pretrained, parameters after a restart, their plan)."""
    x = jax.random.normal(jax.random.key(1), (2, 10))
    base, pretrained, _, plan, params = adapted_network(x, module=Small(), scheme="sharing")
    params = mora_jax.join(
        perturb(mora_jax.split(params, plan)[0]), mora_jax.split(params, plan)[1]
    )
    state = mora_jax.freeze_base(optax.adam(1e-3), plan).init(params)
    params, _, plan, _ = mora_jax.merge_and_reset(params, state, plan, donate=False)
    trainable, frozen = mora_jax.split(params, plan)
    return x, base, pretrained, mora_jax.join(perturb(trainable, seed=1), frozen), plan


def outputs(base, params, plan, x):
    return jax.jit(mora_jax.adapt(base, plan).apply)({"params": params}, x)


def test_they_are_refused_beside_the_pretrained_base_and_loaded_beside_their_own(tmp_path, trained):
    x, base, pretrained, params, plan = trained
    checkpoint.save_adapters(tmp_path / "a", params, plan)
    with pytest.raises(ValueError, match="'embed/kernel' holds other numbers") as refused:
        checkpoint.load_adapters(tmp_path / "a", pretrained)
    assert "after a merge_and_reset, which changed the base" in str(refused.value)
    assert "save_adapters(kernels=True)" in str(refused.value)
    frozen = mora_jax.split(params, plan)[1]
    loaded, own = checkpoint.load_adapters(tmp_path / "a", frozen)
    assert own == plan
    assert own.merges == plan.merges == 1
    wanted = outputs(base, params, plan, x)
    np.testing.assert_array_equal(outputs(base, loaded, own, x), wanted)
    narrow = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), frozen)
    with pytest.raises(ValueError, match="is bfloat16, and was float32 when adapters were merged"):
        checkpoint.load_adapters(tmp_path / "a", narrow)


def test_with_their_kernels_they_need_no_other_base(tmp_path, trained):
    x, base, pretrained, params, plan = trained
    checkpoint.save_adapters(tmp_path, params, plan, name="poems", kernels=True)
    loaded, own = checkpoint.load_adapters(tmp_path, pretrained, name="poems")
    wanted = outputs(base, params, plan, x)
    np.testing.assert_array_equal(outputs(base, loaded, own, x), wanted)
    assert not np.array_equal(loaded["embed"]["kernel"], pretrained["embed"]["kernel"])


def test_plans_keep_their_merges_in_json(trained):
    *_, plan = trained
    assert mora_jax.Plan.from_json(plan.to_json()).merges == 1
    fields = json.loads(plan.to_json())
    del fields["merges"], fields["digest"]  # as version 0.1.0 wrote it
    assert mora_jax.Plan.from_json(json.dumps(fields)).merges == 0


def test_files_for_peft_say_which_base(tmp_path, trained):
    *_, params, plan = trained
    message = "merge_and_reset has changed the base.*base_model="
    with pytest.raises(ValueError, match=message):
        mora_jax.export.save_lora(tmp_path / "a", params, plan, 2, names=NAMES)
    assert not (tmp_path / "a").exists()
    lora, lora_plan, _ = mora_jax.project_to_lora(params, plan, 2)
    with pytest.raises(ValueError, match=message):
        mora_jax.peft.save_adapters(tmp_path / "a", lora, lora_plan, names=NAMES)
    mora_jax.export.save_lora(tmp_path / "a", params, plan, 2, names=NAMES, base_model="own/base")
    saved = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == "own/base"


def test_a_bank_has_one_base(trained):
    *_, params, plan = trained
    first = dataclasses.replace(plan, merges=0)
    with pytest.raises(ValueError, match="merged into 1 times, those in the bank to one of 0"):
        mora_jax.stack_adapters({"a": (params, first), "b": (params, plan)})
