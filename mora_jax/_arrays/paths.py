"""Where adapters live in a tree of parameters: the one place that knows.

A parameter tree is a nested mapping with arrays at its leaves, as Flax makes it. Paths are written
as in error messages and patterns, with slashes: `"layers/self_attn/q_proj/kernel"`. A layer's
adapter stands beside its kernel, under one name:

    layers/self_attn/q_proj/kernel         the base, frozen
    layers/self_attn/q_proj/mora/matrix_sharing    the adapter, trained

An `nnx.State` is such a tree too, with variables at its leaves.
"""

from __future__ import annotations

import difflib
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
from flax import nnx
from flax.core import FrozenDict

#: The name under which a layer holds its adapter.
ADAPTER = "mora"

#: The metadata by which a variable of NNX remembers the name of its leaf.
NAME = "mora_name"

#: The name under which a collection `mora` of linen, or an adapter of NNX, holds adapter ids.
IDS = "adapter_ids"


def join_path(*parts: str) -> str:
    """`"a/b/c"` from its parts, leaving out empty ones (the root's own path is empty)."""
    return "/".join(part for part in parts if part)


def last_name(path: str) -> str:
    """The last part of a path."""
    return path.rpartition("/")[2]


def adapter_path(layer: str, kernel_name: str) -> str:
    """Where a layer's adapter stands: in the layer, beside its kernel.

    A kernel that shares its dict with others is a layer by itself, with no name of its own in it.

    >>> adapter_path("attention/query", "kernel"), adapter_path("mlp/gate", "")
    ('attention/query/mora', 'mlp/mora/gate')
    """
    parent, _, name = layer.rpartition("/")
    return join_path(layer, ADAPTER) if kernel_name else join_path(parent, ADAPTER, name)


def escape(name: str) -> str:
    """A name as a part of a path: a slash within it is written as in URLs, `%2F`."""
    return name.replace("%", "%25").replace("/", "%2F")


def readable(path: str) -> str:
    """A path as users write it: slashes within names, which Haiku has, are slashes.

    >>> readable("mlp%2F~%2Flinear_0/w")
    'mlp/~/linear_0/w'
    """
    return _unescape(path)


def _unescape(part: str) -> str:
    return part.replace("%2F", "/").replace("%25", "%")


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Leaves by path, names escaped.

    Raises:
      TypeError: for what is no tree of dicts.
      ValueError: for an empty key, or two keys of one dict that are written alike, such as 1 and
        "1": both would have one path.

    >>> flatten({"dense": {"kernel": 1, "bias": 2}})
    {'dense/kernel': 1, 'dense/bias': 2}
    """
    if not isinstance(tree, Mapping):
        raise TypeError(_no_tree(tree))
    leaves: dict[str, Any] = {}
    parts = _parts_of(tree, prefix)
    for part, value in zip(parts, tree.values(), strict=True):
        path = join_path(prefix, part)
        if isinstance(value, Mapping):
            leaves.update(flatten(value, path))
        else:
            leaves[path] = value
    return leaves


def _no_tree(value: Any) -> str:
    found = f"expected nested dicts of parameters, got a {type(value).__name__}. "
    if isinstance(value, nnx.Module):
        return found + (
            "Of an NNX model give the state, flax.nnx.state(model, nnx.Param), or take the "
            "functions of mora_jax.nnx, which take models."
        )
    return found + (
        "Of a linen model give variables['params']; of other trees what mora_jax.as_params makes."
    )


def _parts_of(tree: Mapping[Any, Any], prefix: str) -> list[str]:
    """The keys of a dict as parts of paths."""
    parts = [escape(str(key)) for key in tree]
    where = f"the dict at {prefix!r}" if prefix else "the outermost dict of the parameters"
    if "" in parts:
        raise ValueError(f"{where} has an empty key, which is no part of a path: rename it.")
    if len(set(parts)) < len(parts):
        alike = [key for key, part in zip(tree, parts, strict=True) if parts.count(part) > 1]
        raise ValueError(f"{where} has keys that make one path, {alike[:2]}: rename one of them.")
    return parts


def unflatten(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`.

    >>> unflatten({"dense/kernel": 1, "dense/bias": 2})
    {'dense': {'kernel': 1, 'bias': 2}}
    """
    tree: dict[str, Any] = {}
    for path, value in leaves.items():
        *parents, name = map(_unescape, path.split("/"))
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return tree


def unflatten_like(leaves: Mapping[str, Any], *likes: Mapping[Any, Any]) -> Any:
    """`unflatten` with the keys of other trees, and an `nnx.State` where one of them is.

    Empty dicts of theirs are kept.

    >>> state = nnx.State({"layers": {0: {"kernel": 1}}})
    >>> nnx.to_pure_dict(unflatten_like({"layers/0/mora/matrix_sharing": 2}, state))
    {'layers': {0: {'mora': {'matrix_sharing': 2}}}}
    """
    keys: dict[str, Any] = {}
    for like in likes:
        _note_keys(like, "", keys)
    tree: dict[Any, Any] = {}
    for path, value in leaves.items():
        parts = path.split("/")
        prefixes = ["/".join(parts[: end + 1]) for end in range(len(parts))]
        *parents, name = (
            keys.get(prefix, _unescape(part)) for prefix, part in zip(prefixes, parts, strict=True)
        )
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    for like in likes:
        _keep_empty(like, tree)
    return nnx.State(tree) if any(isinstance(like, nnx.State) for like in likes) else tree


def _note_keys(tree: Mapping[Any, Any], prefix: str, keys: dict[str, Any]) -> None:
    """Path -> the key itself, for every node; NNX has numbers among its keys."""
    for key, value in tree.items():
        path = join_path(prefix, escape(str(key)))
        keys[path] = key
        if isinstance(value, Mapping):
            _note_keys(value, path, keys)


#: What holds parameters by name.
_DICTS = (dict, nnx.State, FrozenDict)


def rename_leaves(tree: Any, names: Mapping[str, str]) -> Any:
    """Any pytree, with leaves of the parameters in it under other names.

    After `merge_and_reset` the names of adapters say their next schemes. Parameters and optimizer
    states come back with them; other trees follow, `rename_leaves(tree, old.renamed(new))`.

    Args:
      tree: parameters, an optimizer's state, shardings: dicts of parameters at any depth.
      names: path of a leaf of the parameters -> its new path in the same dict.

    >>> rename_leaves(({"d": {"mora": {"a": 1}}}, 2), {"d/mora/a": "d/mora/b"})
    ({'d': {'mora': {'b': 1}}}, 2)
    """

    def rename(node: Any, prefix: str = "", kind: type = dict) -> Any:
        if not isinstance(node, _DICTS):
            return node if jax.tree_util.all_leaves([node]) else rename_leaves(node, names)
        # A State and a FrozenDict have plain dicts within, which they show as their own kind.
        plain = type(node) is kind or isinstance(node, dict)
        own = dict if plain else type(node)
        items = {}
        for key, value in node.items():
            path = join_path(prefix, escape(str(key)))
            new = _last_name(path, names) if ADAPTER in prefix.split("/") else None
            value = _rename_variable(rename(value, path, type(node)), new)
            items[key if new is None else new] = value
        return own(items)  # pyright: ignore[reportCallIssue]

    return jax.tree.map(rename, tree, is_leaf=lambda node: isinstance(node, _DICTS))


def _rename_variable(value: Any, name: str | None) -> Any:
    if name is None or not isinstance(value, nnx.Variable) or not value.has_metadata(NAME):
        return value
    renamed = value.copy()
    renamed.set_metadata(**{NAME: name})
    return renamed


def _last_name(path: str, names: Mapping[str, str]) -> str | None:
    """The new name of what ends in one of these paths, as in the states of some optimizers."""
    parts = path.split("/")
    for start in range(len(parts)):
        if new := names.get("/".join(parts[start:])):
            return _unescape(last_name(new))
    return None


def _keep_empty(like: Mapping[Any, Any], tree: dict[Any, Any]) -> None:
    """Puts the empty dicts of one tree into another, in place."""
    for key, value in like.items():
        if not isinstance(value, Mapping):
            continue
        if not value:
            tree.setdefault(key, {})
        elif _has_empty(value) and isinstance(node := tree.setdefault(key, {}), dict):
            _keep_empty(value, node)


def _has_empty(tree: Mapping[Any, Any]) -> bool:
    inner = [value for value in tree.values() if isinstance(value, Mapping)]
    return any(not value or _has_empty(value) for value in inner)


def path_seed(path: str) -> int:
    """A number for a path, the same everywhere, to derive random keys by.

    >>> path_seed("dense/kernel")
    988593171
    """
    return zlib.crc32(path.encode())


def is_adapter(path: str) -> bool:
    """Whether a leaf's path lies inside an adapter.

    >>> is_adapter("q_proj/mora/matrix_sharing"), is_adapter("q_proj/kernel")
    (True, False)
    """
    return ADAPTER in path.split("/")[:-1]


def list_paths(paths: Iterable[str], limit: int = 8) -> str:
    """Paths for an error message: the first few, and how many more there are."""
    paths = sorted(map(readable, paths))
    more = f", and {len(paths) - limit} more" if len(paths) > limit else ""
    return ", ".join(repr(path) for path in paths[:limit]) + more


def list_near(wanted: str, paths: Iterable[str]) -> str:
    """Paths for an error message: those that are written much like the wanted one.

    >>> list_near("layers/upp", ["layers/up", "embed"])
    "'layers/up'"
    """
    paths = list(paths)
    return list_paths(difflib.get_close_matches(wanted[:200], paths, n=8, cutoff=0.4) or paths)


#: What `jax.tree_util` says of where a leaf stands in any pytree.
KeyPath = tuple[Any, ...]


def parameter_path(keys: KeyPath) -> str:
    """The run of dict keys at the end of a key path, as a path of parameters."""
    names: list[str] = []
    for key in reversed(out_of_box(keys)):
        if not isinstance(key, jax.tree_util.DictKey):
            break
        names.append(escape(str(key.key)))
    return "/".join(reversed(names))


def out_of_box(keys: KeyPath) -> KeyPath:
    """The key path of the box, where an array stands in one."""
    boxed = len(keys) > 1 and isinstance(keys[-2], jax.tree_util.DictKey)
    return keys[:-1] if boxed and field_name(keys) == "value" else keys


def field_name(keys: KeyPath) -> str | None:
    """The name of the attribute that a key path ends in; None if it ends in another key."""
    return getattr(keys[-1], "name", None) if keys else None
