"""The Llama family's forward over batches without padding: only attention sees rows, everything else sees tokens.

Exact: nothing but the order of sums differs from the padded forward. An unpadded batch holds `input_ids` (positions,):
first the `prefix` tokens of each of `groups`, which are computed once for all rows of the group, then the rows' own.
`h[grid]` are the rows, (rows, length), and the i-th position of their own stands in cell `cells[i]`. Padding is
computed and never used: its gradient is zero.
"""

from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_trainer import runtime
from mlx_trainer.cuda import kernels
from mlx_trainer.models.attention import causal_attention, fused
from mlx_trainer.models.exponential import sigmoid
from mlx_trainer.models.gather import take_once, take_rows
from mlx_trainer.models.lora import dropout_keys, project
from mlx_trainer.models.recomputation import Policy, run_again, run_once
from mlx_trainer.models.rms_norm import normed
from mlx_trainer.models.rows import Rows

LLAMAS = ("llama", "mistral")
"""Model types that mlx-lm builds with its Llama."""

Seen = tuple[mx.array, mx.array]
"""Keys and values."""
Keys = tuple[mx.array | None, ...]
"""One random key for each layer that drops some of its input."""


def takes_unpadded(settings: Mapping[str, Any]) -> bool:
    """Whether `hidden_states` computes what the model of this config.json does: a Llama with full attention."""
    return settings["model_type"] in LLAMAS and "sliding_attention" not in (settings.get("layer_types") or ())


def hidden_states(model: Any, batch: Any, policy: Policy = "none") -> mx.array:
    """The last hidden states of the positions that predict, (predictions, hidden), of an unpadded batch.

    The last layer's MLP sees those alone, since nothing comes after it that looks at the others. `policy` says what the
    gradient runs again.
    """
    rows = Rows.of(batch)
    h = embedded(model.model.embed_tokens, batch.input_ids)
    *earlier, last = model.model.layers
    for layer in earlier:
        h = block(layer, h, rows, policy)
    h = block(last, h, rows, policy, lambda h: take_once(h, batch.predicting, batch.predictions))
    return normed(model.model.norm, h)


def embedded(layer: Any, ids: mx.array) -> mx.array:
    """The embeddings of `ids` (positions,); of a frozen layer they are gathered as all else is, by one kernel."""
    frozen = type(layer) is nn.Embedding and not layer.trainable_parameters()
    h: mx.array = take_rows(layer.weight, ids) if frozen else layer(ids)
    return h


def block(
    layer: Any,
    h: mx.array,
    rows: Rows,
    policy: Policy = "none",
    chosen: Callable[[mx.array], mx.array] = lambda h: h,
) -> mx.array:
    """One layer of the model; `h` is (positions, hidden), and so is the result but for what is `chosen`."""
    mixer, mlp = layer.self_attn, layer.mlp
    # Drawn before anything that may run again, and alike whatever the policy is.
    mixing = dropout_keys(mixer.q_proj, mixer.k_proj, mixer.v_proj, mixer.o_proj)
    feeding = dropout_keys(mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    inner: Policy = "none" if policy == "block" else policy

    def whole(h: mx.array) -> mx.array:
        h = chosen(h + attention(mixer, layer.input_layernorm, h, rows, mixing, inner))
        return h + feed_forward(mlp, layer.post_attention_layernorm, h, feeding, inner)

    result: mx.array = (run_again if policy == "block" else run_once)(whole, layer)(h)
    return result


def attention(layer: Any, norm: Any, h: mx.array, rows: Rows, dropout: Keys, policy: Policy) -> mx.array:
    """Attention of `norm(h)` within each row and to its prefix; `h` and the result are (positions, hidden)."""
    cheap = run_again if policy in ("selective", "mlp") else run_once

    def projected(h: mx.array) -> tuple[mx.array, ...]:
        """Queries, keys and values of the prefixes, if there are any, and of the rows."""
        inputs = project_normed(norm, h, layer.q_proj, layer.k_proj, layer.v_proj, keys=dropout[:3])
        return rows.heads(layer, *inputs)

    def attended(*parts: mx.array) -> tuple[mx.array, ...]:
        mixed, seen = attend(*parts[:3], scale=layer.scale)
        return (mixed, attend(*parts[3:], scale=layer.scale, before=seen)[0]) if parts[3:] else (mixed,)

    def out(*mixed: mx.array) -> mx.array:
        (out,) = project(rows.positions(*mixed), layer.o_proj, keys=dropout[3:])
        return out

    parts = cheap(projected, norm, layer.q_proj, layer.k_proj, layer.v_proj)(h)
    if policy == "attention" or (cheap is run_again and not fused(h.dtype)):
        result: mx.array = run_again(lambda *parts: out(*attended(*parts)), layer.o_proj)(*parts)
    else:
        result = cheap(out, layer.o_proj)(*attended(*parts))
    return result


def attend(
    queries: mx.array, keys: mx.array, values: mx.array, *, scale: float, before: Seen | None = None
) -> tuple[mx.array, Seen]:
    """Attention of rows (rows, heads, length, d), and what they leave behind: their keys and values.

    They see themselves and what stands `before` them: keys and values of prefixes, (groups, heads, prefix, d), each for
    as many rows that follow each other.
    """
    (count, _, length, _), seen = queries.shape, (keys, values)

    def behind(before: mx.array, own: mx.array) -> mx.array:
        return mx.concatenate([mx.repeat(before, count // len(before), axis=0), own], axis=2)

    if before is not None:
        seen = behind(before[0], keys), behind(before[1], values)
    # Rows are padded on the right, so that no token sees padding.
    mixed = causal_attention(queries, *seen, scale)
    return mixed.transpose(0, 2, 1, 3).reshape(count, length, -1), seen


def feed_forward(mlp: Any, norm: Any, h: mx.array, dropout: Keys, policy: Policy) -> mx.array:
    """`down(silu(gate(x)) · up(x))` for x = `norm(h)`."""
    cheap = run_again if policy == "selective" else run_once

    def projected(h: mx.array) -> tuple[mx.array, ...]:
        return project_normed(norm, h, mlp.gate_proj, mlp.up_proj, keys=dropout[:2])

    def out(gate: mx.array, up: mx.array) -> mx.array:
        (out,) = project((gate, up), mlp.down_proj, keys=dropout[2:], make=swiglu)  # type: ignore[arg-type]  # its stub says object
        return out

    def whole(h: mx.array) -> mx.array:
        result: mx.array = cheap(out, mlp.down_proj)(*cheap(projected, norm, mlp.gate_proj, mlp.up_proj)(h))
        return result

    result: mx.array = (run_again if policy == "mlp" else run_once)(whole, norm, mlp)(h)
    return result


def project_normed(norm: Any, h: mx.array, *layers: Any, keys: Keys) -> tuple[mx.array, ...]:
    """`project(norm(h), *layers)`, which keeps h alone, as all blocks do, where `norm` is frozen."""
    if tree_flatten(norm.trainable_parameters()):
        return project(normed(norm, h), *layers, keys=keys)
    return project(h, *layers, keys=keys, make=lambda h: normed(norm, h))


@mx.custom_function
def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """`silu(gate) · up`; its gradient needs `gate` and `up` alone, so nothing between them is kept."""
    if kernels.usable(gate.dtype, gate.shape[-1]):
        return kernels.swiglu(gate, up)
    return gate * sigmoid(gate) * up


@swiglu.vjp
def _swiglu_vjp(primals: Any, cotangent: mx.array, output: mx.array) -> tuple[mx.array, mx.array]:
    gate, up = primals
    if kernels.usable(gate.dtype, gate.shape[-1]):
        return kernels.swiglu_gradient(gate, up, cotangent)
    gate, up = mx.depends([gate, up], [cotangent])  # else a compiled step keeps the first sigmoid for this one
    gated = sigmoid(gate)
    to_gate = cotangent * up * (gated + gate * gated * (1 - gated))
    if runtime.linux_cpu():  # where an exponential costs more than keeping it
        return to_gate, gate * gated * cotangent
    # Two kernels, this one the forward's: with a sigmoid in common, read and written apart, there would be four.
    (again,) = mx.depends([gate], [cotangent])
    return to_gate, again * sigmoid(again) * cotangent
