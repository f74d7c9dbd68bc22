"""The Llama family's forward over batches without padding: only attention sees rows, everything else sees tokens.

Exact: nothing but the order of sums differs from the padded forward. An unpadded batch holds `input_ids` (positions,),
`grid` (rows, length) and `cells` (positions,): `h[grid]` are the rows, and position i stands in cell `cells[i]`.
Padding is computed and never used: its gradient is zero.
"""

from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx

from mlx_trainer.models.attention import causal_attention
from mlx_trainer.models.exponential import sigmoid
from mlx_trainer.models.gather import take_once, take_rows
from mlx_trainer.models.lora import project

LLAMAS = ("llama", "mistral")
"""Model types that mlx-lm builds with its Llama."""

Rearrange = Callable[[mx.array], Any]


def takes_unpadded(settings: Mapping[str, Any]) -> bool:
    """Whether `hidden_states` computes what the model of this config.json does: a Llama with full attention."""
    return settings["model_type"] in LLAMAS and "sliding_attention" not in (settings.get("layer_types") or ())


def hidden_states(model: Any, batch: Any) -> mx.array:
    """The last hidden states of the positions that predict, (predictions, hidden), of an unpadded batch.

    The last layer's MLP sees those alone, since nothing comes after it that looks at the others.
    """
    to_rows, to_positions = rearrangements(batch.grid, batch.cells)
    h = model.model.embed_tokens(batch.input_ids)
    *earlier, last = model.model.layers
    for layer in earlier:
        h = block(layer, h, to_rows, to_positions)
    h = block(last, h, to_rows, to_positions, lambda h: take_once(h, batch.predicting, batch.predictions))
    states: mx.array = model.model.norm(h)
    return states


def block(
    layer: Any,
    h: mx.array,
    to_rows: Rearrange,
    to_positions: Rearrange,
    chosen: Callable[[mx.array], mx.array] = lambda h: h,
) -> mx.array:
    """One layer of the model; `h` is (positions, hidden), and so is the result but for what is `chosen`."""
    h = chosen(h + attention(layer.self_attn, layer.input_layernorm(h), to_rows, to_positions))
    return h + feed_forward(layer.mlp, layer.post_attention_layernorm(h))


def attention(layer: Any, x: mx.array, to_rows: Rearrange, to_positions: Rearrange) -> mx.array:
    """Attention within each row; `x` and the result are (positions, hidden)."""

    def heads(projected: mx.array, count: int) -> mx.array:
        rows: mx.array = to_rows(projected)
        return rows.reshape(*rows.shape[:2], count, -1).transpose(0, 2, 1, 3)

    queries, keys, values = project(x, layer.q_proj, layer.k_proj, layer.v_proj)
    queries = layer.rope(heads(queries, layer.n_heads))
    keys = layer.rope(heads(keys, layer.n_kv_heads))
    values = heads(values, layer.n_kv_heads)
    # Rows are padded on the right, so that no token sees padding.
    mixed = causal_attention(queries, keys, values, layer.scale)
    rows, _, length, _ = mixed.shape
    (attended,) = project(to_positions(mixed.transpose(0, 2, 1, 3).reshape(rows, length, -1)), layer.o_proj)
    return attended


def feed_forward(mlp: Any, x: mx.array) -> mx.array:
    """`down(silu(gate(x)) · up(x))`."""
    gate, up = project(x, mlp.gate_proj, mlp.up_proj)
    gated: mx.array = swiglu(gate, up)  # type: ignore[assignment]  # its stub says that it returns an object
    (out,) = project(gated, mlp.down_proj)
    return out


@mx.custom_function
def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """`silu(gate) · up`; its gradient needs `gate` and `up` alone, so nothing between them is kept."""
    return gate * sigmoid(gate) * up


@swiglu.vjp
def _swiglu_vjp(primals: Any, cotangent: mx.array, output: mx.array) -> tuple[mx.array, mx.array]:
    gate, up = primals
    gated = sigmoid(gate)
    silu = gate * gated
    return cotangent * up * (gated + silu * (1 - gated)), cotangent * silu


def rearrangements(grid: mx.array, cells: mx.array) -> tuple[Rearrange, Rearrange]:
    """Functions from (positions, d) to (rows, length, d) and back, each of which is the other's gradient.

    For each token has one cell, and what flows back into padding, and so into cells beyond a row's end, is zero.
    """
    shape, flat = grid.shape, grid.reshape(-1)

    def to_cells(x: mx.array) -> mx.array:
        return take_rows(x, flat).reshape(*shape, -1)

    def from_cells(rows: mx.array) -> mx.array:
        return take_rows(rows.reshape(flat.size, -1), cells)

    to_rows, to_positions = mx.custom_function(to_cells), mx.custom_function(from_cells)
    to_rows.vjp(lambda x, cotangent, rows: from_cells(cotangent))
    to_positions.vjp(lambda rows, cotangent, x: to_cells(cotangent))
    return to_rows, to_positions
