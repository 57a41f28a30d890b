"""`epd memory`: what a model needs on one GPU, by stage, before anything is started.

Lives in the user's process; the arithmetic is in `epd.planning`. Nothing is downloaded, and no GPU is needed.
"""

from __future__ import annotations

import argparse
import json
import re

import msgspec

from epd.config import ConfigError
from epd.planning.activations import EAGER, FUSED, encode_bytes, kv_bytes, prefill_bytes
from epd.planning.configs import dtype_bytes, find_config, own_dtype
from epd.planning.memory import GIB, Row, Setting, Weights, most_images, plan
from epd.planning.shapes import Shape, shape_of

_DEFAULT = Setting()
_WIDTH = 126


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """All that is printed. `parameters` are numbers, everything else of memory is in bytes on one device."""

    model: str
    dtype: str
    parameters: dict[str, int]
    shape: Shape
    setting: Setting
    encode_bytes_per_patch: int
    prefill_bytes_per_token: int
    kv_bytes_per_token: int
    rows: list[Row]


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `memory` to the command line."""
    parser = subparsers.add_parser(
        "memory",
        help="show what a model needs on one GPU, by stage",
        description="Show weights, activations, batches and KV of each stage, for one-piece serving, for encode and "
        "prefill together (EP+D), and for EPD. Arithmetic on the model's configuration; nothing is downloaded.",
    )
    parser.add_argument(
        "--model",
        default="builtin",
        metavar="CONFIG_OR_DIR",
        help="a config.json, a folder with one, a name in the local Hugging Face cache, `builtin`, or a model of the "
        "paper: minicpm-v-2.6, internvl2-8b, internvl2-26b (default: %(default)s)",
    )
    parser.add_argument("--gpu-gb", type=float, default=80.0, metavar="GIB", help="memory of one GPU (%(default)g)")
    parser.add_argument(
        "--gpu-memory-utilization", type=float, default=0.9, metavar="F", help="the part of it to use (%(default)g)"
    )
    parser.add_argument(
        "--kv-fraction",
        type=float,
        default=_DEFAULT.kv_fraction,
        metavar="F",
        help="the part of what weights leave that is set aside for KV (%(default)g)",
    )
    parser.add_argument("--tensor-parallel", type=int, default=1, metavar="N", help="GPUs of one worker (1)")
    parser.add_argument("--dtype", help="of the weights: float32, bfloat16, float16, fp8, int8 (default: the model's)")
    parser.add_argument("--kv-dtype", help="of the KV cache (default: 16 bits, or the model's)")
    parser.add_argument("--max-model-len", type=int, default=0, metavar="N", help="context (default: the model's)")
    parser.add_argument("--image", type=_size, default=(4032, 3024), metavar="WxH", help="pixels (4032x3024)")
    parser.add_argument(
        "--images", type=int, default=_DEFAULT.num_images, metavar="N", help="per request (%(default)s)"
    )
    parser.add_argument(
        "--tokens-per-image", type=int, default=0, metavar="N", help="instead of what the model's rule gives"
    )
    parser.add_argument("--prompt-tokens", type=int, default=_DEFAULT.prompt_tokens, metavar="N", help="of text (22)")
    parser.add_argument("--output-tokens", type=int, default=_DEFAULT.output_tokens, metavar="N", help="at most (10)")
    parser.add_argument(
        "--attention",
        choices=(FUSED, EAGER),
        default=FUSED,
        help="of the tower; `eager` keeps all scores, as the paper's MiniCPM-V did (default: %(default)s)",
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON, in bytes")
    form.add_argument("--markdown", action="store_true", help="print a Markdown table")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints the report; returns 0.

    Raises:
        ConfigError: the model or an option will not do.
    """
    found = report(args)
    if args.json:
        print(json.dumps(msgspec.to_builtins(found), indent=1))
    elif args.markdown:
        from epd.planning.show import markdown

        print(markdown(found.rows, found.setting))
    else:
        _show(found)
    return 0


def report(args: argparse.Namespace) -> Report:
    """The report that a command line asks for.

    Raises:
        ConfigError: the model or an option will not do.
    """
    if not 0 < args.gpu_memory_utilization <= 1 or not 0 <= args.kv_fraction < 1:
        raise ConfigError("--gpu-memory-utilization and --kv-fraction are parts, between 0 and 1")
    if min(args.gpu_gb, args.tensor_parallel, args.images) <= 0 or min(args.prompt_tokens, args.output_tokens) < 0:
        raise ConfigError("--gpu-gb, --tensor-parallel and --images are at least 1, tokens at least 0")
    from epd.local import extras

    extras.need(extras.MODELS)
    name, config = find_config(args.model)
    width, height = args.image
    shape = shape_of(config, width, height, args.tokens_per_image)
    dtype = args.dtype or own_dtype(config)
    weight_bytes = dtype_bytes(dtype)
    computed_bytes = max(weight_bytes, 2)  # what is quantized is computed with in 16 bits
    setting = Setting(
        gpu_bytes=int(args.gpu_gb * GIB),
        utilization=args.gpu_memory_utilization,
        kv_fraction=args.kv_fraction,
        tensor_parallel=args.tensor_parallel,
        dtype_bytes=computed_bytes,
        kv_dtype_bytes=dtype_bytes(args.kv_dtype) if args.kv_dtype else computed_bytes,
        max_model_len=args.max_model_len or shape.max_model_len,
        num_images=args.images,
        prompt_tokens=args.prompt_tokens,
        output_tokens=args.output_tokens,
        attention=args.attention,
    )
    from epd.planning.weights import count_parameters  # torch and transformers

    counted = count_parameters(config)
    weights = Weights(
        tower=(counted.tower + counted.projector) * weight_bytes,
        language=counted.language * weight_bytes,
        other=counted.other * weight_bytes,
    )
    shards = args.tensor_parallel
    return Report(
        model=name,
        dtype=dtype,
        parameters={each: getattr(counted, each) for each in counted.__struct_fields__},
        shape=shape,
        setting=setting,
        encode_bytes_per_patch=encode_bytes(
            shape.tower, shape.text.width, shape.picture, computed_bytes, args.attention, shards
        ),
        prefill_bytes_per_token=prefill_bytes(shape.text, computed_bytes, shards),
        kv_bytes_per_token=kv_bytes(shape.text, setting.kv_dtype_bytes, shards),
        rows=plan(shape, weights, setting),
    )


def _show(found: Report) -> None:
    from epd.local.display import PatientConsole
    from epd.planning.show import gib, table

    console = PatientConsole()
    if console.width < _WIDTH:  # a line that the terminal breaks is better than numbers that are cut off
        console = PatientConsole(width=_WIDTH)
    counts, picture, setting = found.parameters, found.shape.picture, found.setting
    millions = {name: f"{count / 1e6:,.0f}" if count >= 1e6 else f"{count / 1e6:.2g}" for name, count in counts.items()}
    console.print(
        f"[bold]{found.model}[/]  {sum(counts.values()) / 1e9:.3g}B parameters in {found.dtype}: tower "
        f"{millions['tower']}M, projector {millions['projector']}M, language {millions['language']}M"
    )
    console.print(
        f"An image is {picture.num_patches} patches of {picture.tokens} tokens, {picture.num_tokens:,} tokens in all. "
        f"Activations {found.encode_bytes_per_patch / 2**20:,.3g} MiB a patch in encode, "
        f"{found.prefill_bytes_per_token / 2**10:,.3g} KiB a token in prefill; KV "
        f"{found.kv_bytes_per_token / 2**10:,.3g} KiB a token."
    )
    console.print(
        f"{gib(setting.gpu_bytes)} GiB x {setting.utilization:g} on a GPU"
        + (f", {setting.tensor_parallel} of them for a worker" if setting.tensor_parallel > 1 else "")
        + f"; context {setting.max_model_len:,}; batches beside {setting.kv_fraction:.0%} of free memory kept for KV"
    )
    console.print()
    console.print(table(found.rows, setting))
    images = {layout: most_images(found.rows, layout) for layout in ("one piece", "EP+D", "EPD")}
    told = ", ".join(f"{layout} [bold]{count}[/] ({limit})" for layout, (count, limit) in images.items())
    console.print(f"Most images in one request: {told}")


def _size(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,5})", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 4032x3024")
    return int(found[1]), int(found[2])
