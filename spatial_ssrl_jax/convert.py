"""Converts: python -m spatial_ssrl_jax.convert to-orbax|to-hf|merge-lora SRC [ADAPTER] DST"""

import argparse
import json
from collections.abc import Sequence
from typing import get_args

import jax
import jax.numpy as jnp
from flax import traverse_util

from spatial_ssrl_jax.checkpoint.export import copy_files, export, write_config
from spatial_ssrl_jax.checkpoint.models import open_model
from spatial_ssrl_jax.checkpoint.params import PARAMS, save_params
from spatial_ssrl_jax.common.errors import run_command
from spatial_ssrl_jax.common.outputs import atomic_folder, check_output_folder, check_space
from spatial_ssrl_jax.common.paths import local_copy, user_path
from spatial_ssrl_jax.config.schema import MeshSettings
from spatial_ssrl_jax.parallel.mesh import make_mesh
from spatial_ssrl_jax.parallel.sharding import Layout
from spatial_ssrl_jax.qwen_vl.compute import Dtype
from spatial_ssrl_jax.qwen_vl.lora import merge_adapters
from spatial_ssrl_jax.qwen_vl.param_tree import merge_params
from spatial_ssrl_jax.qwen_vl.peft import read_adapter


def main(argv: Sequence[str]) -> None:
    args = _parse(argv)
    source = open_model(args.source)
    inputs, adapters = [*source.inputs], {}
    if args.direction == "merge-lora":
        adapter = user_path(args.adapter)
        inputs.append(adapter)
        adapters = read_adapter(local_copy(adapter), source.config)
    target = user_path(args.target)
    check_output_folder(target, args.overwrite, *inputs)
    layout = Layout(make_mesh(MeshSettings()))
    params = source.load(layout, None if args.dtype == "keep" else args.dtype)
    dtype = args.dtype if args.dtype != "keep" else str(jax.tree.leaves(params)[0].dtype)
    if adapters:
        params = merge_adapters(merge_params(params, jax.tree.map(jnp.asarray, adapters)), dtype)
    check_space(target, sum(x.size * jnp.dtype(dtype).itemsize for x in jax.tree.leaves(params)))
    if args.direction == "to-orbax":
        with atomic_folder(target, args.overwrite, inputs) as partial:
            copy_files(source, partial)
            write_config(source.config, partial, dtype)
            save_params(partial / PARAMS, params)
    else:
        export(source, params, target, dtype, args.overwrite)
    count = sum(x.size for x in jax.tree.leaves(params))
    if args.json:
        report = {"target": str(target), "parameters": count, "dtype": dtype}
        print(json.dumps(report | {"tensors": len(traverse_util.flatten_dict(params))}))
    else:
        print(f"{target}: {count:,} parameters in {dtype}")


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--dtype", choices=("keep", *get_args(Dtype)), default="keep")
    shared.add_argument("--overwrite", action="store_true", help="replace what the folder holds")
    shared.add_argument("--json", action="store_true", help="print one JSON object")
    parser = argparse.ArgumentParser(
        prog="python -m spatial_ssrl_jax.convert",
        description="Turns a Hugging Face folder into an Orbax checkpoint and back, or merges a "
        "LoRA adapter into its base.",
    )
    directions = parser.add_subparsers(dest="direction", required=True)
    for name, text in (
        ("to-orbax", "writes an Orbax checkpoint"),
        ("to-hf", "writes a Hugging Face folder"),
        ("merge-lora", "adds a PEFT adapter to its base and writes a Hugging Face folder"),
    ):
        options = directions.add_parser(
            name,
            help=text,
            parents=[shared],
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        options.add_argument("source", help="folder, checkpoint or hub id to read")
        if name == "merge-lora":
            options.add_argument("adapter", help="a folder in the format of PEFT")
        options.add_argument("target", help="folder to write; all may be gs://…")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(main)
