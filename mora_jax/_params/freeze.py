"""optax transforms that train adapters and leave the base alone."""

from __future__ import annotations

from collections.abc import Hashable

import optax

from mora_jax._arrays.paths import flatten, is_adapter, list_paths, unflatten_like
from mora_jax._params.checks import check_plan
from mora_jax._plans.plan import Plan


def freeze_base(
    optimizer: optax.GradientTransformation, plan: Plan
) -> optax.GradientTransformationExtraArgs:
    """Applies `optimizer` to what the plan trains, and an update of zero to everything else.

    Three groups, each with a state of its own: the adapters, the parameters of `also_train`, and
    the frozen ones, which have none. So no moments are kept for the base, a clip by global norm
    inside `optimizer` sees no base gradient, and `merge_and_reset` can restart the adapters alone.

    `optimizer` runs once for each of the first two, so such a clip takes each norm by itself.

    Built on `optax.partition`. It takes whole trees and the trainable half of `split` alike.

    Args:
      optimizer: any optax transformation.
      plan: the plan.

    Returns:
      An optax transformation.

    Raises:
      ValueError: from its `init` and `update`, where the tree lacks what the plan trains.

    >>> import flax.linen as nn, jax, mora_jax
    >>> model = mora_jax.adapt(nn.Dense(6), mora_jax.MoRAConfig(rank=1, scheme="sharing"))
    >>> plan = mora_jax.plan(model, jax.ShapeDtypeStruct((1, 3), "float32"))
    >>> params = model.init(jax.random.key(0), jax.numpy.ones((1, 3)))["params"]
    >>> state = freeze_base(optax.sgd(1.0, momentum=0.9), plan).init(params)
    >>> [leaf.shape for leaf in jax.tree.leaves(state)]  # the momentum of the matrix, no other
    [(3, 3)]
    """

    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise TypeError(
            f"freeze_base(optimizer, plan): expected an optax transformation, got a "
            f"{type(optimizer).__name__}."
        )
    check_plan(plan)
    # Where adapters stand, not their names: after a restart these say another scheme.
    wanted = {*map(_place, plan.adapter_leaves()), *dict(plan.also_train)}

    def labels(params):
        leaves = flatten(params)
        if missing := wanted - {_place(path) for path in leaves}:
            raise ValueError(
                f"the tree lacks what the plan trains: {list_paths(missing)}; it has "
                f"{list_paths(leaves)}. Give the parameters themselves, with adapters."
            )
        groups = unflatten_like({path: plan.role(path) for path in leaves}, params)
        # A FrozenDict wants labels in a FrozenDict.
        return groups if isinstance(groups, type(params)) else type(params)(groups)

    groups: dict[Hashable, optax.GradientTransformation] = {
        "adapter": optimizer,
        "also_train": optimizer,
        "frozen": optax.set_to_zero(),
    }
    return optax.partition(groups, labels)


def _place(path: str) -> str:
    """The dict that an adapter's leaf stands in; the path itself of all else."""
    return path.rpartition("/")[0] if is_adapter(path) else path
