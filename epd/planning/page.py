"""Writes `docs/memory.md`: the paper's models, its figures, and ours: `python -m epd.planning.page [--check]`.

Lives in a developer's process.
"""

from __future__ import annotations

import sys
from pathlib import Path

from epd.planning.configs import find_config
from epd.planning.memory import GIB, Row, Setting, Weights, most_images, plan
from epd.planning.paper import CLAIMS, SIZES, Claims
from epd.planning.shapes import shape_of
from epd.planning.show import gib, markdown
from epd.planning.weights import Parameters, count_parameters

PATH = Path(__file__).resolve().parent.parent.parent / "docs" / "memory.md"
_GPU = 80 * GIB
_UTILIZATION, _KV_FRACTION = 0.9, 0.8

_HEAD = """# Memory

<!-- Written by `python -m epd.planning.page`; edit that. -->

What a stage needs, and what splitting the stages frees, as arithmetic on a model's configuration:

```sh
epd memory --model minicpm-v-2.6 --gpu-gb 80
epd memory --model config.json --gpu-gb 24 --max-model-len 8192 --image 1024x768 --images 4
```

`--model` is a `config.json`, a folder with one, a name in the local Hugging Face cache, or one of the paper's models,
whose sizes are in `epd/planning/models/`. Nothing is downloaded. `--json` and `--markdown` print the same for
programs and pages.

## How it is counted
- **Weights**: transformers builds the model without memory, and its parameters are counted: tower, projector between
  tower and language model, language model. As in vLLM, the projector is in the encode worker. Tensor parallelism
  divides them. Models that transformers does not have are refused, but for the paper's two families. Where a family's
  way to cut pictures is not known here, `--tokens-per-image` says what an image takes.
- **Activations**: the tensors that one layer has alive at its peak, by formula (`epd/planning/activations.py`): for a
  patch in the tower, for a token in the language model. Kernels' workspaces are not counted, so these are lower
  bounds. `--attention eager` keeps all attention scores of the tower.
- **KV**: keys and values of all layers, in bytes a token. Layers with a sliding window count as if they had none.
- **Batches and images** have the memory that weights and KV leave; `--kv-fraction` of what weights leave is kept for
  KV. A worker that encodes and prefills needs room for both peaks.

Tests hold the weights against real files and real engines, and KV against the blocks that vLLM makes
(`tests/planning/`). Activations were measured on a CPU only, where 8 patches in two layers of MiniCPM-V's tower took
178 MiB instead of 170; on a GPU never.

## The paper's models
On a GPU of 80 GiB of which 90% is used, in 16 bits, 80% of free memory kept for KV, 10 images of 4032 x 3024 in a
request, sizes in GiB.
"""

_TAIL = """
## What differs and why
- **Weights** are the paper's within 0.2 points where the projector is counted with the language model, as the paper
  must have done. In our pipeline it is in the encode worker, which therefore holds a little more, and a prefill
  worker less.
- **Memory kept for KV.** The paper says 50% for its online experiments. Its limits of MiniCPM-V in EP+D (77 patches
  of 313 x 234, 26 x 3, 7 x 10) fit 80%, so 80% is used above. This and the attention of MiniCPM-V's tower were chosen
  to fit; nothing else was.
- **Attention of MiniCPM-V's tower.** Only with all scores in memory does a patch need what the paper's limits tell
  (142 MiB; 22 MiB without). With fused attention, the default of the command and of vLLM today, memory is no limit in
  either way of serving: 49 images of 4032 x 3024 fit EP+D, too, with 50% kept for KV.
- **InternVL2's activations** are up to 1.7 times ours, in the tower (15 and 67 requests where we find 25 and 110) and
  in the language model (20% of free memory where we find 12%): our formulas are lower bounds, and the paper's engine
  kept more alive. Where memory is the limit, we promise more than the paper measured.
- **Context.** Where the paper's EPD is limited by it, so are we: 490 patches of MiniCPM-V are 32,340 of 32,768
  tokens, 19 images of InternVL2-8B 63,270 of 65,536. For InternVL2-26B we know no stretched context for sure; the
  paper's 10 images are 33,300 tokens, which 32,768 would not hold, so 65,536 is assumed.
- **An encode worker of ours does not limit a request's images at all**: patches are encoded in batches as they fit
  (`max_num_batched_tokens`), and only the pool of embeddings must hold one request's patches. The row says what fits
  at once, as the paper counts.
- **Peak of an encode worker** (the paper: 93.3% less) is not in a table: our notes of the paper do not say for which
  batch it was measured.
- **ultravox**, the paper's audio model, is not here: which version it was is not known to us.
- **What we could not look up.** The sizes in `epd/planning/models/` were written down without network access. The
  totals and shares above agree with the published ones; rope scaling and other fields that no number here needs are
  left out.
"""


def _setting(claims: Claims, num_images: int = 10) -> Setting:
    return Setting(
        gpu_bytes=_GPU,
        utilization=_UTILIZATION,
        kv_fraction=_KV_FRACTION,
        max_model_len=claims.context,
        attention=claims.attention,
        num_images=num_images,
    )


def _rows(claims: Claims, counted: Parameters, size: tuple[int, int], num_images: int = 10) -> list[Row]:
    _, config = find_config(claims.config)
    weights = Weights(tower=2 * (counted.tower + counted.projector), language=2 * counted.language)
    return plan(shape_of(config, *size), weights, _setting(claims, num_images))


def _find(rows: list[Row], layout: str, stage: str) -> Row:
    return next(row for row in rows if row.layout == layout and stage in row.stages)


def _line(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def page() -> str:
    """The page's text."""
    counted = {claims.config: count_parameters(find_config(claims.config)[1]) for claims in CLAIMS}
    parts = [_HEAD]
    for claims in CLAIMS:
        rows = _rows(claims, counted[claims.config], SIZES[-1])
        found = counted[claims.config]
        parts.append(
            f"### {claims.name}\n{found.total / 1e9:.2f}B parameters: tower {found.tower / 1e6:,.0f}M, projector"
            f" {found.projector / 1e6:,.0f}M, language {found.language / 1e6:,.0f}M; {claims.attention} attention in"
            f" the tower; context {claims.context:,}.\n\n{markdown(rows, _setting(claims))}\n"
        )
    parts += ["## Beside the paper's figures\nOurs / the paper's; “–”: the paper does not say, or we do not know.\n"]
    parts += [_weights(counted), _images(counted), _batches(counted), _kv(counted)]
    return "\n".join(parts) + _TAIL


def _weights(counted: dict[str, Parameters]) -> str:
    lines = [
        "Weights that a worker has less than a whole model, with the projector on the side of the language model (as"
        " the paper),\nand what our workers hold:\n",
        _line("model", "encode", "prefill", "encode worker, GiB", "prefill worker, GiB"),
        _line("---", "--:", "--:", "--:", "--:"),
    ]
    for claims in CLAIMS:
        found = counted[claims.config]
        share = 100 * found.tower / found.total
        lines.append(
            _line(
                claims.name,
                f"−{100 - share:.1f}% / −{-claims.encode_weights:g}%",
                f"−{share:.1f}% / −{-claims.prefill_weights:g}%",
                gib(2 * (found.tower + found.projector)),
                gib(2 * found.language),
            )
        )
    return "\n".join(lines) + "\n"


def _images(counted: dict[str, Parameters]) -> str:
    lines = [
        "Most images in one request:\n",
        _line("model", "picture", "EP+D", "EPD", "limited by"),
        _line("---", "---", "--:", "--:", "---"),
    ]
    for claims in CLAIMS:
        for (width, height), told in zip(SIZES, claims.images, strict=True):
            rows = _rows(claims, counted[claims.config], (width, height))
            both, apart = most_images(rows, "EP+D"), most_images(rows, "EPD")
            paper = [each or "–" for each in told]
            limits = f"{both[1]}, {apart[1]}"
            cells = (f"{both[0]} / {paper[0]}", f"{apart[0]} / {paper[1]}", limits)
            lines.append(_line(claims.name, f"{width} x {height}", *cells))
    return "\n".join(lines) + "\n"


def _batches(counted: dict[str, Parameters]) -> str:
    lines = [
        "Most requests of 10 images at once:\n",
        _line("model", "picture", "EP of EP+D", "encode", "prefill"),
        _line("---", "---", "--:", "--:", "--:"),
    ]
    for claims in CLAIMS:
        for (width, height), told in zip(SIZES, claims.batches, strict=True):
            rows = _rows(claims, counted[claims.config], (width, height))
            stages = (("EP+D", "encode"), ("EPD", "encode"), ("EPD", "prefill"))
            ours = [_find(rows, *each).requests for each in stages]
            cells = [f"{one or 'none'} / {paper or 'none'}" for one, paper in zip(ours, told, strict=True)]
            lines.append(_line(claims.name, f"{width} x {height}", *cells))
    return "\n".join(lines) + "\n"


def _kv(counted: dict[str, Parameters]) -> str:
    lines = [
        "KV left of free memory, with so many images of 4032 x 3024 at once:\n",
        _line("model", "images", "EP of EP+D", "prefill of EPD"),
        _line("---", "--:", "--:", "--:"),
    ]
    for claims in CLAIMS:
        for num_images, both, apart in claims.kv:
            rows = _rows(claims, counted[claims.config], SIZES[-1], num_images)
            ours = [_find(rows, layout, "prefill").kv_left_fraction for layout in ("EP+D", "EPD")]
            lines.append(_line(claims.name, num_images, f"{ours[0]:.0%} / {both}%", f"{ours[1]:.0%} / {apart}%"))
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> int:
    """Writes the page, or with `--check` only compares; returns 1 if it differs."""
    text = page()
    if arguments == ["--check"]:
        return int(not PATH.exists() or PATH.read_text("utf-8") != text)
    PATH.write_text(text, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
