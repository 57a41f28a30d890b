"""What the paper (arXiv 2501.05460) says about memory. Pure.

`docs/memory.md` shows these figures beside ours. The paper uses A100 GPUs of 80 GB and FP16 weights.
"""

from __future__ import annotations

import msgspec

from epd.planning.activations import EAGER, FUSED

SIZES = ((313, 234), (787, 444), (4032, 3024))
"""The paper's pictures: width and height in pixels."""


class Claims(msgspec.Struct, frozen=True, kw_only=True):
    """One model's figures; those by picture are in the order of `SIZES`, None if the paper says out of memory.

    Attributes:
        name: as people write it.
        config: its file in `epd/planning/models/`.
        billions: parameters of the tower and of the language model.
        context: tokens; InternVL2 stretches the 32,768 of its language model, or the paper's requests would not fit.
        attention: of its tower in the paper's engine, as its figures tell.
        encode_weights: what an encode worker has less than a whole model, in percent.
        prefill_weights: the same of a prefill worker.
        images: most images of one request, EP+D and EPD.
        batches: most requests of 10 images at once: EP of EP+D, then encode and prefill of EPD.
        kv: the part of free memory that is left for KV, in percent, by images of 4032 x 3024: EP+D, EPD.
    """

    name: str
    config: str
    billions: tuple[float, float]
    context: int
    attention: str
    encode_weights: float
    prefill_weights: float
    images: tuple[tuple[int, int], ...] = ()
    batches: tuple[tuple[int | None, int, int], ...] = ()
    kv: tuple[tuple[int, int, int], ...] = ()


CLAIMS = (
    Claims(
        name="MiniCPM-V 2.6",
        config="minicpm-v-2.6",
        billions=(0.4, 7),
        context=32768,
        attention=EAGER,
        encode_weights=-95,
        prefill_weights=-5,
        images=((77, 490), (26, 165), (7, 49)),
        batches=((7, 49, 86), (2, 16, 29), (None, 4, 9)),
    ),
    Claims(
        name="InternVL2-8B",
        config="internvl2-8b",
        billions=(0.3, 7.7),
        context=65536,
        attention=FUSED,
        encode_weights=-96.2,
        prefill_weights=-3.7,
        images=((19, 19), (0, 0), (19, 19)),
        batches=((2, 15, 2), (9, 67, 10), (2, 15, 2)),
    ),
    Claims(
        name="InternVL2-26B",
        config="internvl2-26b",
        billions=(6, 20),
        context=65536,
        attention=FUSED,
        encode_weights=-78.3,
        prefill_weights=-21.6,
        images=((1, 10), (11, 45), (1, 10)),
        batches=((None, 6, 1), (1, 22, 4), (None, 6, 1)),
        kv=((5, 67, 89), (10, 36, 80)),
    ),
)
