"""Converts: python -m spatial_ssrl_jax.convert to-orbax|to-hf|merge-lora SRC [ADAPTER] DST"""

import argparse
import json
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from etils import epath
from flax import traverse_util

from spatial_ssrl_jax.config import MeshSettings
from spatial_ssrl_jax.errors import run_command
from spatial_ssrl_jax.folders import check_folder, fetched, folder_at, in_bucket, whole_folder
from spatial_ssrl_jax.qwen2_5_vl.lora import merge_adapters
from spatial_ssrl_jax.qwen2_5_vl.peft import read_adapter
from spatial_ssrl_jax.qwen2_5_vl.tree import Params, join
from spatial_ssrl_jax.run import models
from spatial_ssrl_jax.run.checkpoint import PARAMS, save_params
from spatial_ssrl_jax.run.mesh import Layout, make_mesh


def main(argv: Sequence[str]) -> None:
    args = _parse(argv)
    source = models.open_model(args.source)
    inputs, adapters = [source.weights, source.files], {}
    if in_bucket(args.source):
        inputs.append(folder_at(args.source))
    if args.direction == "merge-lora":
        inputs.append(folder_at(args.adapter))
        adapters = read_adapter(fetched(inputs[-1]), source.config)
    target = folder_at(args.target)
    check_folder(target, args.overwrite, *inputs)
    layout = Layout(make_mesh(MeshSettings()))
    params = source.load(layout, None if args.dtype == "keep" else args.dtype)
    dtype = args.dtype if args.dtype != "keep" else str(jax.tree.leaves(params)[0].dtype)
    if adapters:
        params = merge_adapters(join(params, jax.tree.map(jnp.asarray, adapters)), dtype)
    if args.direction == "to-orbax":
        _write_orbax(source, params, target, dtype)
    else:
        models.export(source, params, target, dtype)
    count = sum(x.size for x in jax.tree.leaves(params))
    if args.json:
        report = {"target": str(target), "parameters": count, "dtype": dtype}
        print(json.dumps(report | {"tensors": len(traverse_util.flatten_dict(params))}))
    else:
        print(f"{target}: {count:,} parameters in {dtype}")


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--dtype", choices=("keep", "float32", "bfloat16"), default="keep")
    shared.add_argument("--overwrite", action="store_true", help="replace what the folder holds")
    shared.add_argument("--json", action="store_true", help="print one JSON object")
    parser = argparse.ArgumentParser(
        prog="python -m spatial_ssrl_jax.convert",
        description="Turns a Hugging Face folder into an Orbax checkpoint and back, or merges a "
        "LoRA adapter into its base.",
    )
    directions = parser.add_subparsers(dest="direction", required=True)
    for name, says in (
        ("to-orbax", "writes weights as Orbax has them"),
        ("to-hf", "writes a Hugging Face folder"),
        ("merge-lora", "adds a PEFT adapter to its base and writes a Hugging Face folder"),
    ):
        options = directions.add_parser(
            name,
            help=says,
            parents=[shared],
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        options.add_argument("source", help="folder, checkpoint or hub id to read")
        if name == "merge-lora":
            options.add_argument("adapter", help="folder as PEFT writes it")
        options.add_argument("target", help="folder to write; all may be gs://…")
    return parser.parse_args(argv)


def _write_orbax(
    source: models.ModelFolder, params: Params, target: epath.Path, dtype: str
) -> None:
    """Writes weights and the model's files; the folder appears when it is complete."""
    with whole_folder(target) as partial:
        models.copy_files(source, partial)
        models.write_config(source.config, partial, dtype)
        save_params(partial / PARAMS, params)


if __name__ == "__main__":
    run_command(main)
