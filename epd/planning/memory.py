"""What fits on one GPU, by stage, for one-piece serving, EP+D (encode and prefill together) and EPD. Pure arithmetic.

Weights leave free memory; of that a part is set aside for KV, and activations have the rest. One-piece serving and EP
need room for what the tower and the language model have alive at their peaks, since an allocator does not give back
what the first has used in pieces that fit the second.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from epd.planning.activations import FUSED, encode_bytes, kv_bytes, prefill_bytes
from epd.planning.shapes import Shape

GIB = 1 << 30


class Weights(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes of weights; the projector goes with the tower, as vLLM has it, `other` with every stage."""

    tower: int
    language: int
    other: int = 0


class Setting(msgspec.Struct, frozen=True, kw_only=True):
    """The device and the requests. `kv_fraction` of free memory is set aside for KV, if there is any.

    `num_images` are those of the request that peaks and batches are told for; `prompt_tokens` its text, `output_tokens`
    what it may answer. The defaults are the paper's.
    """

    gpu_bytes: int = 80 * GIB
    utilization: float = 1.0
    kv_fraction: float = 0.5
    tensor_parallel: int = 1
    dtype_bytes: int = 2
    kv_dtype_bytes: int = 2
    max_model_len: int = 0
    num_images: int = 10
    prompt_tokens: int = 22
    output_tokens: int = 10
    attention: str = FUSED


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """A stage's memory, all in bytes on one device; -1 if something does not apply, 0 if it does not fit.

    Attributes:
        layout: "one piece", "EP+D" or "EPD".
        stages: those that share the engine.
        tower: weights of tower and projector.
        language: weights of the language model.
        other: weights that are neither.
        free: what the weights leave.
        peak: activations of one request with `num_images` images, all at once.
        kv_left: what that peak leaves for KV.
        kv_left_tokens: the same in tokens.
        patches: most patches that fit at once beside the KV that is set aside; -1 if nothing is encoded.
        requests: most requests of `num_images` images that fit at once beside it, or have their KV in it.
        images: most images of one request.
        limit: what bounds `images`: "context", "KV", "memory" (for activations), or "weights" that do not fit.
    """

    layout: str
    stages: tuple[str, ...]
    tower: int
    language: int
    other: int
    free: int
    peak: int
    kv_left: int
    kv_left_tokens: int
    patches: int
    requests: int
    images: int
    limit: str

    @property
    def weights(self) -> int:
        """All weights."""
        return self.tower + self.language + self.other

    @property
    def kv_left_fraction(self) -> float:
        """What the peak leaves for KV, of free memory."""
        return self.kv_left / self.free if self.free > 0 and self.kv_left >= 0 else 0.0


LAYOUTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("one piece", ("encode", "prefill", "decode")),
    ("EP+D", ("encode", "prefill")),
    ("EP+D", ("decode",)),
    ("EPD", ("encode",)),
    ("EPD", ("prefill",)),
    ("EPD", ("decode",)),
)


def plan(shape: Shape, weights: Weights, setting: Setting) -> list[Row]:
    """The memory of every stage of every layout."""
    return [_row(layout, stages, shape, weights, setting) for layout, stages in LAYOUTS]


def _row(layout: str, stages: tuple[str, ...], shape: Shape, weights: Weights, setting: Setting) -> Row:
    shards, picture = setting.tensor_parallel, shape.picture
    encodes, prefills, has_text = "encode" in stages, "prefill" in stages, stages != ("encode",)
    tower = weights.tower // shards if encodes else 0
    language = weights.language // shards if has_text else 0
    free = int(setting.gpu_bytes * setting.utilization) - tower - language - weights.other
    reserved = int(free * setting.kv_fraction) if has_text else 0
    per_patch = (
        encode_bytes(shape.tower, shape.text.width, picture, setting.dtype_bytes, setting.attention, shards)
        if encodes
        else 0
    )
    per_token = prefill_bytes(shape.text, setting.dtype_bytes, shards) if prefills else 0
    per_kv = kv_bytes(shape.text, setting.kv_dtype_bytes, shards)

    def activations(num_images: int) -> int:
        tokens = num_images * picture.num_tokens + setting.prompt_tokens
        return num_images * picture.num_patches * per_patch + tokens * per_token

    def tokens(num_images: int) -> int:
        return num_images * picture.num_tokens + setting.prompt_tokens + setting.output_tokens

    room = max(0, free - reserved)
    peak = activations(setting.num_images)
    if stages == ("decode",):  # one token of each request, which is nothing compared with its KV
        peak = prefill_bytes(shape.text, setting.dtype_bytes, shards)
    per_image = picture.num_patches * per_patch + picture.num_tokens * per_token
    at_once = room // (per_patch + per_token * picture.tokens) if encodes else -1
    requests = room // peak
    limits = {"memory": (room - setting.prompt_tokens * per_token) // per_image} if per_image else {}
    if setting.max_model_len:
        limits["context"] = (setting.max_model_len - tokens(0)) // picture.num_tokens
    if has_text:
        requests = min(requests, reserved // (tokens(setting.num_images) * per_kv))
        limits["KV"] = (reserved // per_kv - tokens(0)) // picture.num_tokens
    if free <= 0:
        limits = {"weights": 0}
    limit = min(limits, key=lambda name: limits[name])
    kv_left = max(0, free - peak) if has_text else -1
    return Row(
        layout=layout,
        stages=stages,
        tower=tower,
        language=language,
        other=weights.other,
        free=free,
        peak=peak,
        kv_left=kv_left,
        kv_left_tokens=kv_left // per_kv if has_text else -1,
        patches=max(0, at_once) if encodes else -1,
        requests=max(0, requests),
        images=max(0, limits[limit]),
        limit=limit,
    )


def most_images(rows: Sequence[Row], layout: str) -> tuple[int, str]:
    """Most images of one request that every stage of a layout can take, and what bounds them."""
    row = min((row for row in rows if row.layout == layout), key=lambda row: row.images)
    return row.images, row.limit
