"""What compiled programs say about communication and copies."""

import re
from collections import Counter
from math import prod

import jax

_COLLECTIVES = "all-gather|all-to-all|collective-permute|all-reduce|reduce-scatter"
_INSTRUCTION = re.compile(rf"= (\(.*?\)|\S+) ({_COLLECTIVES})(?:-start)?\((.*)")
_ARRAY = re.compile(r"([a-z]+)(\d+)\w*\[([\d,]*)\]")


def compiled(function, *args, **options):
    return jax.jit(function, **options).lower(*args).compile()


def hlo(function, *args, **options):
    return compiled(function, *args, **options).as_text()


def collectives(text):
    """The collectives of a program, in order."""
    return [name for _, name, _ in _INSTRUCTION.findall(text)]


def received_bytes(text):
    """How many bytes a device receives from others, by collective."""
    received = Counter()
    for result, name, rest in _INSTRUCTION.findall(text):
        size, group = _bytes(result), _group_size(rest)
        received[name] += {
            "all-gather": size * (group - 1) // group,
            "all-to-all": size * (group - 1) // group,
            "collective-permute": size,
            "all-reduce": 2 * size * (group - 1) // group,
            "reduce-scatter": size * (group - 1),
        }[name]
    return received


def copies(text, shape=None):
    """How many arrays a program copies, all or those of a shape."""
    size = r"[\d,]*" if shape is None else ",".join(map(str, shape))
    return len(re.findall(rf"= \w+\[{size}\]\S* copy(?:-start)?\(", text))


def transpositions(text):
    """How many arrays a program transposes, inside of fusions or not."""
    return len(re.findall(r"= \S+ transpose\(", text))


def _bytes(result):
    """The bytes of an array or a tuple of arrays, as HLO writes their types."""
    return sum(
        int(bits) // 8 * prod(int(size) for size in shape.split(",") if size)
        for _, bits, shape in _ARRAY.findall(result)
    )


def _group_size(attributes):
    """How many devices take part, from replica_groups={{0,1}}, [2,4]<=[8], or mesh['a'=2,'b'=8] {'a','b':(1)4}."""
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return len(found[1].split(","))
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", attributes):
        return int(found[1])
    if found := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", attributes):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        return prod(int(part or sizes[name]) for name, part in re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", found[2]))
    assert "collective-permute" in attributes or "source_target_pairs" in attributes, attributes
    return 1
