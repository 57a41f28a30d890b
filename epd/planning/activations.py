"""Memory that a step needs besides weights and KV: what a layer of each stack holds at its peak. Pure arithmetic.

A layer's peak is in its attention or in its MLP, whichever is larger; layers follow one another in the same memory.
Only tensors that a layer writes and still needs are counted, not kernels' workspaces and what an allocator loses to
fragmentation. So these are lower bounds; `docs/memory.md` has them beside what the paper measured.
"""

from __future__ import annotations

from epd.planning.shapes import Picture, Stack

FUSED, EAGER = "fused", "eager"
_FLOAT32 = 4


def layer_bytes(stack: Stack, positions: int, dtype_bytes: int, attention: str = FUSED) -> int:
    """Peak of one layer over a sequence, in bytes.

    Args:
        stack: the layers.
        positions: length of the sequence.
        dtype_bytes: bytes of a number.
        attention: "fused" kernels keep no scores; "eager" ones have, of every head, `positions` x `positions` scores,
            their softmax in float32, and that as `dtype`, all at once.
    """
    heads_width = stack.num_heads * stack.head_dim
    qkv = heads_width + 2 * stack.num_kv_heads * stack.head_dim
    residual = 2 * stack.width  # what is added at the end, and its norm
    in_attention = (residual + qkv + heads_width) * dtype_bytes * positions
    if attention == EAGER:
        in_attention += stack.num_heads * positions * positions * (2 * dtype_bytes + _FLOAT32)
    hidden = 3 * stack.inner if stack.gated else 2 * stack.inner  # before and after the activation function
    in_mlp = (residual + hidden) * dtype_bytes * positions
    return max(in_attention, in_mlp)


def encode_bytes(
    tower: Stack, text_width: int, picture: Picture, dtype_bytes: int, attention: str = FUSED, shards: int = 1
) -> int:
    """What encoding one patch takes at its peak, its embeddings included, in bytes on each of `shards` devices.

    Args:
        tower: its layers.
        text_width: width of the language model, which is that of the embeddings.
        picture: how large a patch is.
        dtype_bytes: bytes of a number.
        attention: as in `layer_bytes`.
        shards: tensor parallel size; the residual is on every device, the rest is divided.
    """
    residual = 2 * tower.width * dtype_bytes * picture.positions
    layer = layer_bytes(tower, picture.positions, dtype_bytes, attention)
    return residual + -(-(layer - residual) // shards) + picture.tokens * text_width * dtype_bytes


def prefill_bytes(text: Stack, dtype_bytes: int, shards: int = 1) -> int:
    """What one prompt token takes in a prefill step at its peak, its input embedding included, in bytes."""
    residual = 2 * text.width * dtype_bytes
    layer = layer_bytes(text, 1, dtype_bytes)
    return residual + -(-(layer - residual) // shards) + text.width * dtype_bytes


def kv_bytes(text: Stack, dtype_bytes: int, shards: int = 1) -> int:
    """KV of one token in all layers, in bytes on each of `shards` devices; heads that are too few are repeated."""
    heads = max(1, text.num_kv_heads // shards)
    return 2 * text.num_layers * heads * text.head_dim * dtype_bytes
