"""Whether each adapted layer multiplies by its stored kernel, and nothing else reads that kernel.

If so, an adapter and a merge do the same. If not, as in a layer with normalised weights or where a
head borrows an embedding, they differ: such a layer is refused when the plan is made.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
from flax.core import DenyList

from mora_jax._arrays.paths import ADAPTER, join_path, list_paths, parameter_path
from mora_jax._tracing.uses import Uses, find_uses, mark
from mora_jax.linen._layers import Leaves, MoRA
from mora_jax.linen._scopes import Marks

#: Runs a model: (variables, inputs, mutable collections, flags of the scope) -> what it returns.
Run = Callable[[Any, Any, Any, dict[str, Any]], Any]

#: How `init` runs a model: the mutable collections, and the flags of the scope.
AS_INIT: tuple[Any, dict[str, Any]] = DenyList("intermediates"), {"initializing": True}


def check_kernel_uses(
    run: Run, variables: Mapping[str, Any], inputs: Any, kernels: Mapping[str, str]
) -> None:
    """Raises ValueError for layers whose adapter would not be the same as a merge.

    Args:
      run: runs the model, with `mark_kernels` among its interceptors.
      variables: shapes of the model's variables.
      inputs: arrays or shapes.
      kernels: path of a layer's kernel -> path of the layer, of all that are adapted.
    """
    uses = _find_uses(run, variables, inputs, kernels)
    wrong = {}
    for path, layer in kernels.items():
        by = uses.others.get(path)
        if path in uses.computed:
            read = f", with `{by}`" if by else ""
            wrong[layer] = f"multiplies by a kernel that is computed from the stored one{read}"
        elif by is not None:
            what = f"read by `{by}`" if by else "returned by the model"
            wrong[layer] = f"has a kernel that is also {what}, outside of the layer"
    if not wrong:
        return
    first = next(iter(wrong))
    others = wrong.keys() - {first}
    likewise = f" The same holds for {list_paths(others)}." if others else ""
    # A kernel that is computed reaches no product as it is stored, so a function leaves it alone.
    shared = set(uses.others) - uses.computed
    as_function = (
        ", or adapt the model as a function of its parameters, which follows kernels out of their "
        "layers: mora_jax.adapt(lambda params, *inputs: model.apply({'params': params}, *inputs), "
        "config)"
    )
    raise ValueError(
        f"the layer {first!r} {wrong[first]}. There an adapter and its merge would differ: the "
        f"adapter acts on the layer's own product, a merge changes the stored kernel.{likewise} "
        f"Leave such layers out with MoRAConfig.exclude{as_function if shared else ''}."
    )


def mark_kernels(marks: Marks, next_fun, args, kwargs, context):
    """An interceptor for adapted layers: their kernels are marked, in place of an adapter."""
    module = context.module
    if marks.are_on(module):
        marks.enter(module)
    if context.method_name != "__call__" or not isinstance(module, MoRA | Leaves):
        return next_fun(*args, **kwargs)
    if isinstance(module, Leaves):
        return mark(args[0], join_path(*module.path[:-1], module.kernel_name))
    lhs, kernel, *others = args
    path = join_path(*module.path[:-1], "kernel")
    return module.dot_general(lhs, mark(kernel, path), *others, **kwargs)


def _find_uses(run: Run, variables: Mapping[str, Any], inputs: Any, kernels: Iterable[str]) -> Uses:
    variables = {name: value for name, value in variables.items() if name != ADAPTER}
    # Some models do not go on with the inputs that they start with, such as a cache that takes one
    # token at a time, and some write into their parameters. They are run as they start.
    errors = []
    as_apply: tuple[Any, dict[str, Any]] = DenyList(("params", "intermediates")), {}
    starting = {"params": variables["params"]}
    for given, (mutable, flags) in ((variables, as_apply), (starting, AS_INIT)):
        arguments, call = (given, inputs), _outputs_of(run, mutable, flags)
        try:
            return find_uses(call, arguments, _numbers(arguments, set(kernels)))
        except Exception as error:  # whatever the model raises
            errors.append(error)
    warnings.warn(
        f"the model does not run on given parameters ({errors[-1]!r}), so it is not known whether "
        "its kernels are read outside of their layers. Compare the adapted with the merged model.",
        stacklevel=5,
    )
    return Uses()


def _outputs_of(run: Run, mutable: Any, flags: dict[str, Any]) -> Callable[[Any], list[Any]]:
    def call(arguments):
        variables, inputs = arguments
        outputs, changed = run(variables, inputs, mutable, flags)
        kept = {name: value for name, value in changed.items() if name != "params"}
        return [leaf for leaf in jax.tree.leaves((outputs, kept)) if hasattr(leaf, "dtype")]

    return call


def _numbers(arguments: Any, kernels: set[str]) -> dict[int, str]:
    """Number of a leaf of (variables, inputs) -> path, of the kernels among them."""
    keyed, _ = jax.tree.flatten_with_path(arguments)
    numbers = {}
    for number, ((argument, *keys), _) in enumerate(keyed):
        collection, _, path = parameter_path((None, *keys)).partition("/")
        if argument.idx == 0 and collection == "params" and path in kernels:
            numbers[number] = path
    return numbers
