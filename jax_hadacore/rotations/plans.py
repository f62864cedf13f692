"""Plans for known models, by the names of their parameters in google-tunix and in Hugging Face's checkpoints.

R1 rotates the residual stream, and R2, one a layer, the values of each head; folded, both are free. R4 rotates what
down_proj reads: with it the model must transform that online, `hadamard(act(gate) * up)`. R3, of queries and keys after
their position embedding, folds nothing: apply `hadamard` to both, with no plan.
"""

import dataclasses
from collections.abc import Collection
from typing import Literal, get_args

from ._axis import Axis
from ._plan import Axes, Fuse, Plan, Untie

Naming = Literal["tunix", "hf"]
Tied = Literal["untie", "online"]


@dataclasses.dataclass(frozen=True)
class _Names:
    """How a naming scheme writes the parts of a decoder: each with @ and the axis that is read or written."""

    embed: str
    head: str
    head_transposed: bool  # against the embedding
    final_norm: str
    attention_norm: str
    mlp_norm: str
    qkv_in: str
    v_out: str | Axis
    o_in: str | Axis
    o_out: str
    mlp_in: str
    mlp_out: str
    mlp_hidden: str  # the axis of down_proj that R4 rotates
    v_bias: Axis
    qkv_bias: str
    qk_norm: str
    moe_in: tuple[str, ...]
    moe_out: str
    moe_hidden: str


_TUNIX = _Names(
    embed="embedder/input_embedding@1",
    head="lm_head/w@0",
    head_transposed=True,
    final_norm="final_norm/w",
    attention_norm="layers/*/input_layernorm/w",
    mlp_norm="layers/*/post_attention_layernorm/w",
    qkv_in="layers/*/attn/(q|k|v)_proj/w@0",
    v_out="layers/*/attn/v_proj/w@2",
    o_in="layers/*/attn/o_proj/w@1",
    o_out="layers/*/attn/o_proj/w@2",
    mlp_in="layers/*/mlp/(gate|up)_proj/kernel@0",
    mlp_out="layers/*/mlp/down_proj/kernel@1",
    mlp_hidden="layers/*/mlp/down_proj/kernel@0",
    v_bias=Axis("layers/*/attn/v_bias", 0, split=True),
    qkv_bias="layers/*/attn/(q|k|v)_bias",
    qk_norm="layers/*/attn/(q|k)_norm/w",
    moe_in=("layers/*/mlp/router/kernel@0", "layers/*/mlp/(gate|up)_proj@1"),
    moe_out="layers/*/mlp/down_proj@2",
    moe_hidden="layers/*/mlp/down_proj@1",
)
# torch keeps a linear layer's weight as [out, in].
_HF = _Names(
    embed="model.embed_tokens.weight@1",
    head="lm_head.weight@1",
    head_transposed=False,
    final_norm="model.norm.weight",
    attention_norm="model.layers.*.input_layernorm.weight",
    mlp_norm="model.layers.*.post_attention_layernorm.weight",
    qkv_in="model.layers.*.self_attn.(q|k|v)_proj.weight@1",
    v_out=Axis("model.layers.*.self_attn.v_proj.weight", 0, split=True),
    o_in=Axis("model.layers.*.self_attn.o_proj.weight", 1, split=True),
    o_out="model.layers.*.self_attn.o_proj.weight@0",
    mlp_in="model.layers.*.mlp.(gate|up)_proj.weight@1",
    mlp_out="model.layers.*.mlp.down_proj.weight@0",
    mlp_hidden="model.layers.*.mlp.down_proj.weight@1",
    v_bias=Axis("model.layers.*.self_attn.v_proj.bias", 0, split=True),
    qkv_bias="model.layers.*.self_attn.(q|k|v)_proj.bias",
    qk_norm="model.layers.*.self_attn.(q|k)_norm.weight",
    moe_in=("model.layers.*.mlp.gate.weight@1", "model.layers.*.mlp.experts.*.(gate|up)_proj.weight@1"),
    moe_out="model.layers.*.mlp.experts.*.down_proj.weight@0",
    moe_hidden="model.layers.*.mlp.experts.*.down_proj.weight@1",
)
_NAMES = {"tunix": _TUNIX, "hf": _HF}


def llama(
    *,
    naming: Naming,
    rotations: Collection[str] = ("R1", "R2"),
    tied: Tied | None = None,
    head_dim: int | None = None,
) -> Plan:
    """The plan of Llama 2 and 3, and of models with the same names: Mistral, Yi, SmolLM.

    Args:
        naming: "tunix" for the parameters of google-tunix's Flax models, "hf" for a flat dict of the names in a Hugging
            Face checkpoint.
        rotations: "R1", "R2" and "R4". R4 needs an online transform in the model.
        tied: what to do where the head is the embedding itself. "untie" gives the rotated model a head of its own.
            "online" leaves both as they are, and the model applies R1 after the lookup and its adjoint before the final
            norm. Else the model must have a head.
        head_dim: of R2. The names "hf" need it, where a matrix holds all heads: `head_dim` in config.json, or
            hidden_size / num_attention_heads.

    Returns:
        The plan.

    Raises:
        ValueError: an unknown naming, rotation or tied, or head_dim is missing.

    Example:
        >>> from jax_hadacore.rotations import plans
        >>> list(plans.llama(naming="hf", head_dim=128).rotate)
        ['R1', 'R2']
    """
    return _decoder(naming, rotations, tied, head_dim)


def qwen2(
    *,
    naming: Naming,
    rotations: Collection[str] = ("R1", "R2"),
    tied: Tied | None = None,
    head_dim: int | None = None,
) -> Plan:
    """The plan of Qwen 2 and 2.5, whose queries, keys and values have biases. Arguments as for `llama`.

    Example:
        >>> from jax_hadacore.rotations import plans
        >>> list(plans.qwen2(naming="tunix", rotations=["R1"], tied="untie").rotate)
        ['R1']
    """
    return _decoder(naming, rotations, tied, head_dim, bias=True)


def qwen3(
    *,
    naming: Naming,
    rotations: Collection[str] = ("R1", "R2"),
    tied: Tied | None = None,
    head_dim: int | None = None,
    moe: bool = False,
) -> Plan:
    """The plan of Qwen 3, with norms of queries and keys, and with experts if `moe`. Arguments as for `llama`.

    Example:
        >>> from jax_hadacore.rotations import plans
        >>> list(plans.qwen3(naming="tunix", rotations=["R1", "R2", "R4"], moe=True).rotate)
        ['R1', 'R2', 'R4']
    """
    return _decoder(naming, rotations, tied, head_dim, qk_norm=True, moe=moe)


def gemma3(
    *,
    naming: Naming,
    rotations: Collection[str] = ("R2",),
    head_dim: int | None = None,
    online_r1: bool = False,
) -> Plan:
    """The plan of Gemma 3.

    It has no R1 of the residual stream: the norms after its attention and MLP lie between the weights that write the
    stream and the stream, and their weights do not commute with a rotation. With `online_r1` the plan rotates what
    reads the stream's norms instead: the model then applies R1 after pre_attention_norm and pre_ffw_norm.

    Args:
        naming: as for `llama`.
        rotations: "R2" and "R4".
        head_dim: as for `llama`.
        online_r1: include the online R1.

    Returns:
        The plan.

    Raises:
        ValueError: as for `llama`, or "R1" is among the rotations.

    Example:
        >>> from jax_hadacore.rotations import plans
        >>> list(plans.gemma3(naming="tunix", online_r1=True).rotate)
        ['R2', 'R1']
    """
    if "R1" in rotations:
        raise ValueError(
            "plans.gemma3: R1 cannot be folded, because the norms after attention and MLP (post_attention_norm, "
            "post_ffw_norm) lie between the weights that write the residual stream and the stream. Use online_r1=True, "
            "or R2 and R4 alone."
        )
    _check(naming, rotations)
    if naming == "tunix":
        attention = "layers/*/attn/"
        # Keys and values, or queries too, are stacked in one kernel: the values come last.
        v = Axis(attention + "(kv|qkv)_einsum/w", 3, part=-1)
        o = Axis(attention + "attn_vec_einsum/w", 1)
        mlp, inside = "layers/*/mlp/{}_proj/kernel", 0
        reads = [attention + "q_einsum/w@1?", attention + "(kv|qkv)_einsum/w@2"]
    else:
        layer = "(model|language_model.model|model.language_model).layers.*."
        v = Axis(layer + "self_attn.v_proj.weight", 0, split=True)
        o = Axis(layer + "self_attn.o_proj.weight", 1, split=True)
        mlp, inside = layer + "mlp.{}_proj.weight", 1
        reads = [layer + "self_attn.(q|k|v)_proj.weight@1"]
    found = {}
    if "R2" in rotations:
        found["R2"] = _r2(naming, [v, o], head_dim)
    if "R4" in rotations:
        found["R4"] = Axes([Axis(mlp.format("down"), inside)], signed=False)
    if online_r1:
        found["R1"] = Axes([*reads, Axis(mlp.format("(gate|up)"), inside)])
    return Plan(found, keep=["**"])


def _decoder(
    naming: Naming,
    rotations: Collection[str],
    tied: Tied | None,
    head_dim: int | None,
    *,
    bias: bool = False,
    qk_norm: bool = False,
    moe: bool = False,
) -> Plan:
    """A decoder whose norms are all before what reads the residual stream."""
    _check(naming, rotations)
    if tied not in (None, *get_args(Tied)):
        raise ValueError(f"plans: tied must be None or one of {list(get_args(Tied))}, got {tied!r}.")
    names = _NAMES[naming]
    reads_mlp = names.moe_in if moe else (names.mlp_in,)
    writes = [names.o_out, names.moe_out if moe else names.mlp_out]
    kept = [*[names.qkv_bias] * bias, *[names.qk_norm] * qk_norm]
    found: dict[str, Axes] = {}
    fuse, untie = [], []
    if "R1" in rotations:
        fuse = [Fuse(names.attention_norm, [names.qkv_in]), Fuse(names.mlp_norm, reads_mlp)]
        ends = [names.embed, names.head]
        if tied == "online":
            ends = []
            kept += [_path(names.embed), names.final_norm]
        else:
            fuse.append(Fuse(names.final_norm, [names.head]))
        if tied == "untie":
            untie = [Untie(_path(names.embed), _path(names.head), transpose=names.head_transposed)]
        found["R1"] = Axes([*ends, names.qkv_in, *reads_mlp, *writes])
    else:
        kept = ["**"]
    if "R2" in rotations:
        found["R2"] = _r2(naming, [names.v_out, *[names.v_bias] * bias, names.o_in], head_dim)
    if "R4" in rotations:
        found["R4"] = Axes([names.moe_hidden if moe else names.mlp_hidden], signed=False)
    return Plan(found, fuse=fuse, untie=untie, keep=kept)


def _r2(naming: Naming, axes: list[str | Axis], head_dim: int | None) -> Axes:
    if naming == "hf" and head_dim is None:
        raise ValueError(
            "plans: R2 needs head_dim with the names of Hugging Face, got None. It is head_dim in config.json, or "
            "hidden_size / num_attention_heads."
        )
    return Axes(axes, per_layer=True, size=head_dim)


def _check(naming: Naming, rotations: Collection[str]) -> None:
    if naming not in _NAMES:
        raise ValueError(f"plans: naming must be one of {list(_NAMES)}, got {naming!r}.")
    if unknown := set(rotations) - {"R1", "R2", "R4"}:
        raise ValueError(f"plans: rotations can be R1, R2 and R4, got {sorted(unknown)}. R3 folds nothing.")


def _path(axis: str) -> str:
    return axis.rpartition("@")[0]
