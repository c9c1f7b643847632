"""Walks over nested containers."""

from collections import OrderedDict
from typing import NamedTuple

from trainer.core.nested import dotted, leaves, map_leaves


class Point(NamedTuple):
    x: int
    y: list


def test_leaves_yields_values_with_paths_in_order():
    nested = {"a": [1, {"b": 2}], "c": (), "d": Point(3, [4])}
    assert [(dotted(path), leaf) for path, leaf in leaves(nested)] == [
        ("a[0]", 1), ("a[1].b", 2), ("c", ()), ("d[0]", 3), ("d[1][0]", 4),
    ]  # fmt: skip


def test_leaves_of_a_plain_value_is_the_value():
    assert list(leaves("text")) == [((), "text")]


def test_map_leaves_keeps_container_types():
    nested = {"a": [1, (2,)], "d": Point(3, [4]), "e": OrderedDict(f=5)}
    doubled = map_leaves(lambda value: 2 * value, nested)
    assert doubled == {"a": [2, (4,)], "d": Point(6, [8]), "e": {"f": 10}}
    assert isinstance(doubled["d"], Point)
