"""The arrays of any pytree of parameters by their paths: nested dicts, nnx.State, Linen's, or a flat dict of names."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax

SEPARATOR = "/"


def leaves(tree: Any) -> dict[str, Any]:
    """The leaves by their paths, in the tree's order: 'layers/0/mlp/up_proj/kernel'.

    The variables of an nnx.State and the boxes of Linen hold their array in an attribute `value`, which is left out.

    Raises:
        ValueError: two leaves have one path.
    """
    found = [(_name(path), leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]]
    by_path = dict(found)
    if len(by_path) < len(found):
        seen: set[str] = set()
        twice = next(path for path, _ in found if path in seen or seen.add(path))
        raise ValueError(f"rotations: two arrays of the tree have the path {twice!r}; it must have one.")
    return by_path


def replace(tree: Any, new: Mapping[str, Any]) -> Any:
    """The tree with other leaves at some of its paths."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: new.get(_name(path), leaf), tree)


def add(tree: Mapping[Any, Any], path: str, like: str, leaf: Any) -> Any:
    """The tree, of mappings, with one more leaf: in a node of the kind of the one at `like`."""
    flat = like in tree
    node = tree
    for name in [like] if flat else like.split(SEPARATOR):
        node = node[name]
    return _with_node(tree, [path] if flat else path.split(SEPARATOR), jax.tree.map(lambda _: leaf, node))


def _name(path: tuple[Any, ...]) -> str:
    if path and path[-1] == jax.tree_util.GetAttrKey("value"):
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator=SEPARATOR)


def _with_node(tree: Mapping[Any, Any], names: Sequence[str], node: Any) -> Any:
    """A copy of the tree, as deep as needed, with a node at a path."""
    same: Any = type(tree)
    first, *rest = names
    if rest:
        node = _with_node(tree[first] if first in tree else same({}), rest, node)
    return same({**tree, first: node})
