"""The Llama family's forward over batches without padding: only attention sees rows, everything else sees tokens.

Exact: nothing but the order of sums differs from the padded forward. An unpadded batch holds `input_ids` (positions,),
`grid` (rows, length) and `cells` (positions,): `h[grid]` are the rows, and position i stands in cell `cells[i]`.
Padding is computed and never used, so that its gradient is zero.
"""

from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx

LLAMAS = ("llama", "mistral")
"""Model types that mlx-lm builds with its Llama."""

Rearrange = Callable[[mx.array], Any]


def takes_unpadded(settings: Mapping[str, Any]) -> bool:
    """Whether `hidden_states` computes what the model of this config.json does: a Llama with full attention."""
    return settings["model_type"] in LLAMAS and "sliding_attention" not in (settings.get("layer_types") or ())


def hidden_states(model: Any, batch: Any) -> mx.array:
    """The last hidden states, (positions, hidden), of an unpadded batch."""
    to_rows, to_positions = rearrangements(batch.grid, batch.cells)
    h = model.model.embed_tokens(batch.input_ids)
    for layer in model.model.layers:
        h = h + attention(layer.self_attn, layer.input_layernorm(h), to_rows, to_positions)
        h = h + feed_forward(layer.mlp, layer.post_attention_layernorm(h))
    states: mx.array = model.model.norm(h)
    return states


def attention(layer: Any, x: mx.array, to_rows: Rearrange, to_positions: Rearrange) -> mx.array:
    """Attention within each row; `x` and the result are (positions, hidden)."""

    def heads(projected: mx.array, count: int) -> mx.array:
        rows: mx.array = to_rows(projected)
        return rows.reshape(*rows.shape[:2], count, -1).transpose(0, 2, 1, 3)

    queries = layer.rope(heads(layer.q_proj(x), layer.n_heads))
    keys = layer.rope(heads(layer.k_proj(x), layer.n_kv_heads))
    values = heads(layer.v_proj(x), layer.n_kv_heads)
    # Rows are padded on the right, so that no token sees padding.
    mixed = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=layer.scale, mask="causal")
    rows, _, length, _ = mixed.shape
    attended: mx.array = layer.o_proj(to_positions(mixed.transpose(0, 2, 1, 3).reshape(rows, length, -1)))
    return attended


def feed_forward(mlp: Any, x: mx.array) -> mx.array:
    """`down(silu(gate(x)) · up(x))`."""
    out: mx.array = mlp.down_proj(swiglu(mlp.gate_proj(x), mlp.up_proj(x)))
    return out


@mx.custom_function
def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """`silu(gate) · up`; its gradient needs `gate` and `up` alone, so nothing between them is kept."""
    return gate * mx.sigmoid(gate) * up


@swiglu.vjp
def _swiglu_vjp(primals: Any, cotangent: mx.array, output: mx.array) -> tuple[mx.array, mx.array]:
    gate, up = primals
    gated = mx.sigmoid(gate)
    silu = gate * gated
    return cotangent * up * (gated + silu * (1 - gated)), cotangent * silu


def rearrangements(grid: mx.array, cells: mx.array) -> tuple[Rearrange, Rearrange]:
    """Functions from (positions, d) to (rows, length, d) and back, whose gradients are gathers too.

    The gradient of a gather is a scatter, which is slow and not repeatable on a GPU; but each token has one cell, so
    the gradient of one function is the other one. What flows back into cells beyond a row's end is nothing.
    """
    shape, flat = grid.shape, grid.reshape(-1)
    is_token = ((flat > 0) | (mx.arange(flat.size) == 0))[:, None]

    @mx.custom_function
    def to_rows(x: mx.array) -> mx.array:
        return x[flat].reshape(*shape, -1)

    @to_rows.vjp
    def to_rows_vjp(x: mx.array, cotangent: mx.array, rows: mx.array) -> mx.array:
        return cotangent.reshape(flat.size, -1)[cells]

    @mx.custom_function
    def to_positions(rows: mx.array) -> mx.array:
        return rows.reshape(flat.size, -1)[cells]

    @to_positions.vjp
    def to_positions_vjp(rows: mx.array, cotangent: mx.array, x: mx.array) -> mx.array:
        return mx.where(is_token, cotangent[flat], mx.zeros((), cotangent.dtype)).reshape(rows.shape)

    return to_rows, to_positions
