"""Converts: python -m spatial_ssrl_jax.convert DIRECTION SRC [ADAPTER] DST

The directions are to-orbax, to-hf, merge-lora and from-fsdp.
"""

import argparse
import json
from collections.abc import Sequence
from typing import get_args

from spatial_ssrl_jax.common.errors import run_command
from spatial_ssrl_jax.common.text import printable


def main(argv: Sequence[str]) -> None:
    args = _parse(argv)
    from spatial_ssrl_jax.checkpoint.conversion import convert

    found = convert(args)
    if args.json:
        print(json.dumps(found))
    else:
        line = f"{found['target']}: {found['parameters']:,} parameters in {found['dtype']}"
        print(printable(line))


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    from spatial_ssrl_jax.qwen_vl.compute import Dtype

    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--dtype", choices=("keep", *get_args(Dtype)), default="keep")
    shared.add_argument("--overwrite", action="store_true", help="replace what the folder holds")
    shared.add_argument("--json", action="store_true", help="print one JSON object")
    parser = argparse.ArgumentParser(
        prog="python -m spatial_ssrl_jax.convert",
        description="Turns a Hugging Face folder into an Orbax checkpoint and back, merges a LoRA "
        "adapter into its base, or reads a checkpoint of verl.",
    )
    directions = parser.add_subparsers(dest="direction", required=True)
    for name, text in (
        ("to-orbax", "writes an Orbax checkpoint"),
        ("to-hf", "writes a Hugging Face folder"),
        ("merge-lora", "adds a PEFT adapter to its base and writes a Hugging Face folder"),
        ("from-fsdp", "merges verl's FSDP shards and writes a Hugging Face folder; needs torch"),
    ):
        options = directions.add_parser(
            name,
            help=text,
            parents=[shared],
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        kinds = "verl's actor/ folder" if name == "from-fsdp" else "folder, checkpoint or hub id"
        options.add_argument("source", help=f"{kinds} to read")
        if name == "merge-lora":
            options.add_argument("adapter", help="a folder in the format of PEFT")
        options.add_argument("target", help="folder to write; all may be gs://…")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(main)
