"""Files that version 0.1.0 wrote (tests/saved) are read by this one, and mean what they meant."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import mora_jax
from helpers.files import SAVED
from helpers.train_runs import losses, train
from mora_jax import checkpoint
from mora_jax._arrays.paths import unflatten

#: Adapters by name, and how far outputs may be off: those of `signs` are bfloat16.
NAMES = {"schemes": 1e-5, "signs": 2e-2, "dora": 1e-5}


class Layers(nn.Module):
    """The model that the adapters were saved for."""

    @nn.compact
    def __call__(self, x):
        for name in "abcdefg":
            x = nn.Dense(8, name=name)(x)
        return nn.LayerNorm(name="norm")(x)


@pytest.fixture(scope="module")
def base():
    with np.load(SAVED / "base.npz", allow_pickle=False) as file:
        return unflatten(dict(file))


def outputs(plan, params):
    x = jax.random.normal(jax.random.key(7), (2, 8))
    return jax.jit(mora_jax.adapt(Layers(), plan).apply)({"params": params}, x)


def test_all_are_listed():
    saved = checkpoint.list_adapters(SAVED / "adapters")
    assert [(one.name, one.version) for one in saved] == [(name, 1) for name in sorted(NAMES)]
    assert all(one.plan is not None for one in saved)


@pytest.mark.parametrize("name", NAMES)
def test_adapters_and_their_plans(base, name):
    params, plan = checkpoint.load_adapters(SAVED / "adapters", base, name=name, dtype=None)
    text = (SAVED / f"{name}_plan.json").read_text()
    assert mora_jax.Plan.from_json(text) == plan
    assert mora_jax.Plan.from_json(plan.to_json()) == plan
    wanted = np.load(SAVED / f"{name}_output.npy", allow_pickle=False)
    np.testing.assert_allclose(outputs(plan, params), wanted, rtol=0, atol=NAMES[name])


def test_a_former_field_of_rotation_is_read():
    """`wrap` was called `cycle`."""
    text = (SAVED / "dora_plan.json").read_text()
    assert json.loads(text)["layers"]["a"]["config"]["scheme"] == {
        "kind": "rotation",
        "cycle": True,
    }
    config = mora_jax.Plan.from_json(text)["a"].config
    assert config.scheme == mora_jax.Rotation(wrap=True)
    assert config.cycle == (
        mora_jax.Rotation(wrap=True),
        mora_jax.Truncation(),
        mora_jax.Decoupling(),
    )
    schemes = mora_jax.Plan.from_json((SAVED / "schemes_plan.json").read_text())
    assert schemes["d"].scheme == mora_jax.Decoupling(wrap=True)


@pytest.mark.parametrize(
    ("name", "successor"),
    [
        ("schemes", mora_jax.Sharing(signs=1)),
        ("signs", mora_jax.Sharing()),  # two blocks have two Walsh functions
        ("dora", mora_jax.Truncation()),
    ],
)
def test_trainings_go_on_through_a_merge(base, name, successor):
    params, plan = checkpoint.load_adapters(SAVED / "adapters", base, name=name)
    before = outputs(plan, params)
    optimizer = mora_jax.freeze_base(optax.adam(1e-3), plan)
    params = jax.tree.map(jnp.asarray, params)
    restarted = mora_jax.merge_and_reset(
        params, optimizer.init(params), plan, key=jax.random.key(0)
    )
    assert restarted.plan == plan.advance()
    assert restarted.plan["a"].scheme == successor
    after = outputs(restarted.plan, restarted.params)
    np.testing.assert_allclose(after, before, rtol=0, atol=NAMES[name])


def test_a_training_goes_on_at_its_checkpoint(tmp_path, capsys):
    out = shutil.copytree(SAVED / "training", tmp_path / "training")
    train(out, "--text", SAVED / "text.txt")
    assert f"resumed at step 5 of {out / 'checkpoints'}" in capsys.readouterr().out
    found, wanted = losses(out / "metrics.csv"), losses(SAVED / "training_metrics.csv")
    assert [*found] == [*wanted] == [*map(str, range(1, 9))]
    np.testing.assert_allclose([*found.values()], [*wanted.values()], rtol=1e-4)
