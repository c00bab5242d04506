"""Adapters in a tree of parameters: attach them, split them off, join them, mark them.

Pure functions over nested dicts, or over an `nnx.State`; where leaves are boxed (partitioned
parameters of linen, variables of NNX), so are the adapters. With a plan that adapts `dense`:

    params                {"dense": {"kernel": W}, "norm": {"scale": s}}
    attach(plan, params)  {"dense": {"kernel": W, "mora": {"matrix": 0}}, "norm": {"scale": s}}
    split(...)            {"dense": {"mora": {"matrix": 0}}},
                          {"dense": {"kernel": W}, "norm": {"scale": s}}
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import jax

from mora_jax._arrays.boxes import box_like, value_of
from mora_jax._arrays.paths import checksum, flatten, is_adapter, join_path, listing, rebuild
from mora_jax._arrays.places import beside, sharding_of
from mora_jax._plans.initialize import draws_numbers, initialize
from mora_jax._plans.plan import Plan
from mora_jax._product import per_example as _examples

Params = Mapping[str, Any]


def attach(plan: Plan, params: Params, *, key: jax.Array | None = None) -> dict[str, Any]:
    """Adds new adapters, of zero delta, beside the kernels of pretrained parameters.

    Args:
      plan: the plan.
      params: the base model's parameters, without adapters; they are not copied.
      key: a PRNG key, required where a scheme draws numbers (`LowRank`).

    Returns:
      The same parameters with an adapter in every layer of the plan, in the config's dtype.

    Raises:
      ValueError: where the plan does not fit the parameters, where they have adapters already,
        or where a key is missing.
      TypeError: where a kernel is not floating, or not an array.

    >>> import flax.linen as nn, mora_jax
    >>> model = mora_jax.adapt(nn.Dense(6), mora_jax.MoRAConfig(rank=1, scheme="sharing"))
    >>> plan = mora_jax.plan(model, jax.ShapeDtypeStruct((1, 3), "float32"))
    >>> pretrained = nn.Dense(6).init(jax.random.key(0), jax.numpy.ones((1, 3)))["params"]
    >>> jax.tree.map(jax.numpy.shape, mora_jax.attach(plan, pretrained))
    {'bias': (6,), 'kernel': (3, 6), 'mora': {'matrix': (3, 3)}}
    """
    leaves = flatten(params)
    check_unadapted(plan, leaves)
    owners, shapes = plan.adapter_owners(), plan.adapter_leaves()
    places = {}
    for path, (kernel, axes) in owners.items():
        if sharding := sharding_of(value_of(leaves[kernel])):
            places[path] = beside(sharding, len(shapes[path].shape), axes)
    make = functools.partial(new_adapters, plan)
    if places:
        # On every device at once, and in every process.
        make = jax.jit(make, out_shardings={path: places.get(path) for path in owners})
    new = make(key)
    boxed = {p: box_like(leaves[kernel], new[p], axes) for p, (kernel, axes) in owners.items()}
    return rebuild(leaves | boxed, params)


def new_adapters(plan: Plan, key: jax.Array | None) -> dict[str, jax.Array]:
    """Path -> new leaf, for every adapter of the plan."""
    drawing = [path for path, spec in plan.items() if draws_numbers(spec.scheme)]
    if drawing and key is None:
        raise ValueError(
            f"key is missing: {plan[drawing[0]].scheme} draws random numbers "
            f"(layers {listing(drawing)}). Pass key=jax.random.key(...)."
        )
    leaves = {}
    for path, spec in plan.items():
        for name, leaf in plan.leaf_paths(path).items():
            # By the path's checksum, so that a layer's numbers do not depend on the others.
            own = None if key is None else jax.random.fold_in(key, checksum(leaf))
            leaves[leaf] = initialize(
                own, spec.shapes[name], spec.config.dtype, name=name, fan_in=spec.features[0]
            )
    return leaves


def split(params: Params, plan: Plan) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parts parameters into those that are trained and those that are frozen.

    Differentiate by the first alone, and no gradient of the base ever exists.

    Args:
      params: parameters with adapters.
      plan: the plan.

    Returns:
      (trainable, frozen): two trees that share no leaf; `join` puts them together again. The first
      holds the adapters and the parameters of `also_train`.

    Raises:
      ValueError: where the plan does not fit the parameters.
    """
    leaves = flatten(params)
    check_adapted(plan, leaves)
    trainable = {path: leaf for path, leaf in leaves.items() if plan.group(path) != "frozen"}
    frozen = {path: leaf for path, leaf in leaves.items() if path not in trainable}
    return rebuild(trainable, params), rebuild(frozen, params)


def join(first: Params, second: Params) -> dict[str, Any]:
    """One tree from two that share no leaf: the inverse of `split`.

    Raises:
      ValueError: where a leaf stands in both.

    >>> join({"dense": {"kernel": 1}}, {"dense": {"mora": {"matrix": 0}}})
    {'dense': {'kernel': 1, 'mora': {'matrix': 0}}}
    """
    ours, theirs = flatten(first), flatten(second)
    if both := ours.keys() & theirs.keys():
        raise ValueError(f"the trees share leaves: {listing(both)}.")
    return rebuild(ours | theirs, first, second)


def trainable_mask(params: Params, plan: Plan) -> dict[str, Any]:
    """True for every leaf that is trained, False for every frozen one: a mask for optax.

    `optax.masked(tx, mask)` alone passes on the raw gradient of what the mask leaves out, so the
    other half belongs to it (`freeze_base` does both):

        optax.chain(
            optax.masked(tx, mask),
            optax.masked(optax.set_to_zero(), jax.tree.map(operator.not_, mask)),
        )

    Raises:
      ValueError: where the plan does not fit the parameters.
    """
    leaves = flatten(params)
    check_adapted(plan, leaves)
    return rebuild({path: plan.group(path) != "frozen" for path in leaves}, params)


def check_unadapted(plan: Plan, leaves: Mapping[str, Any]) -> None:
    """Raises ValueError unless the leaves are a base model's, and the plan's."""
    if present := [path for path in leaves if is_adapter(path)]:
        raise ValueError(f"the parameters have adapters already: {listing(present)}.")
    check_base(plan, leaves)


def check_base(plan: Plan, leaves: Mapping[str, Any]) -> None:
    """Raises ValueError unless the leaves hold the kernels that the plan speaks of."""
    wanted = {join_path(path, spec.kernel_name): spec.kernel_shape for path, spec in plan.items()}
    _check_shapes(wanted | dict(plan.also_train), leaves, "base model")
    for path in wanted:
        dtype = value_of(leaves[path]).dtype
        if not jax.numpy.issubdtype(dtype, jax.numpy.floating):
            raise TypeError(f"{path!r} is {dtype}; a kernel must be floating to take a delta.")


def check_adapted(plan: Plan, leaves: Mapping[str, Any], *, count: int = 1) -> None:
    """Raises ValueError unless the leaves hold the plan's kernels and its adapters, no others.

    Where `count` is more than one, the adapters are banks of as many.
    """
    check_adapters(plan, leaves, count=count)
    check_base(plan, leaves)


def check_adapters(plan: Plan, leaves: Mapping[str, Any], *, count: int = 1) -> None:
    """The part of `check_adapted` that needs no base."""
    wanted = plan.adapter_leaves(count)
    present = {path for path in leaves if is_adapter(path)}
    if not present:
        raise ValueError("the parameters hold no adapters; call attach(plan, params) first.")
    if surplus := present - wanted.keys():
        raise ValueError(f"the parameters hold adapters that the plan lacks: {listing(surplus)}.")
    if count == 1 and (held := bank_size(plan, leaves)) > 1:
        raise _examples.holds_bank(held, "the parameters")
    _check_shapes({path: leaf.shape for path, leaf in wanted.items()}, leaves, "adapters")


def bank_size(plan: Plan, leaves: Mapping[str, Any]) -> int:
    """How many adapters each layer holds; 1 where the shapes of the first one do not say."""
    for path, spec in plan.items():
        names = {name: leaf for name, leaf in plan.leaf_paths(path).items() if leaf in leaves}
        held = {name: value_of(leaves[leaf]) for name, leaf in names.items()}
        if held and all(getattr(leaf, "ndim", 0) > spec.row_axis for leaf in held.values()):
            return _examples.bank_size(held, spec.rows, spec.row_axis)
    return 1


def check_paths(plan: Plan, leaves: Mapping[str, Any]) -> None:
    """Raises ValueError unless there are leaves where the plan has the base model's kernels."""
    _check_present([*plan.kernel_paths(), *dict(plan.also_train)], leaves, "base model")


def _check_present(wanted: Iterable[str], leaves: Mapping[str, Any], what: str) -> None:
    if missing := set(wanted) - leaves.keys():
        raise ValueError(
            f"the plan does not fit the {what}: no parameter at {listing(missing)}. "
            f"There are: {listing(leaves)}. Was the plan made for another model?"
        )


def _check_shapes(
    wanted: Mapping[str, tuple[int, ...]], leaves: Mapping[str, Any], what: str
) -> None:
    _check_present(wanted, leaves, what)
    for path, shape in wanted.items():
        value = value_of(leaves[path])
        if not hasattr(value, "shape"):
            raise TypeError(f"{path!r} is a {type(value).__name__}, not an array.")
        if tuple(value.shape) != shape:
            raise ValueError(
                f"the plan does not fit the {what}: {path!r} has shape "
                f"{tuple(value.shape)}, the plan says {shape}. "
                "Was the plan made for another model, or for another rank?"
            )


def refuse_dora(plan: Plan, done: str, why: str) -> None:
    """Raises ValueError where layers have DoRA, for what needs a delta alone."""
    if layers := [path for path, spec in plan.items() if spec.config.dora]:
        raise ValueError(f"not {done}: DoRA {why} (layers {listing(layers)}).")
