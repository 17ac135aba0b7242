"""What `convert` does: reads a model in one format and writes it in another."""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from spatial_ssrl_jax.checkpoint.export import copy_files, export, main_dtype, write_config
from spatial_ssrl_jax.checkpoint.fsdp import open_fsdp
from spatial_ssrl_jax.checkpoint.models import ModelFolder, open_model
from spatial_ssrl_jax.checkpoint.params import PARAMS, save_params
from spatial_ssrl_jax.common.outputs import atomic_folder, check_output_folder, check_space
from spatial_ssrl_jax.common.paths import local_copy, user_path
from spatial_ssrl_jax.config.schema import MeshSettings
from spatial_ssrl_jax.parallel.mesh import make_mesh
from spatial_ssrl_jax.parallel.sharding import Layout
from spatial_ssrl_jax.qwen_vl.lora import merge_adapters
from spatial_ssrl_jax.qwen_vl.param_tree import Params, merge_params
from spatial_ssrl_jax.qwen_vl.peft import read_adapter


def convert(args: argparse.Namespace) -> dict[str, Any]:
    """Runs `convert` with its options; gives target, parameters, their dtypes and tensors.

    Raises:
      UserError: the source cannot be read, or the target not be written.
    """
    target, dtype = user_path(args.target), None if args.dtype == "keep" else args.dtype
    source, params = _load(args, target, dtype)
    leaves = jax.tree.leaves(params)
    check_space(target, sum(x.nbytes for x in leaves))
    if args.direction == "to-orbax":
        with atomic_folder(target, args.overwrite, source.inputs) as partial:
            copy_files(source, partial)
            write_config(source.config, partial, main_dtype(params))
            save_params(partial / PARAMS, params)
    else:
        export(source, params, target, dtype, args.overwrite)
    return {
        "target": str(target),
        "parameters": sum(x.size for x in leaves),
        "dtype": " and ".join(sorted({str(x.dtype) for x in leaves})),
        "tensors": len(leaves),
    }


def _load(
    args: argparse.Namespace, target: epath.Path, dtype: str | None
) -> tuple[ModelFolder, Params]:
    """The model that is written, once the folder to write has been checked, and its weights."""
    if args.direction == "from-fsdp":
        folder = open_fsdp(args.source)
        check_output_folder(target, args.overwrite, *folder.inputs)
        return folder.load(dtype)
    source = open_model(args.source)
    inputs, adapters = [*source.inputs], {}
    if args.direction == "merge-lora":
        adapter = user_path(args.adapter)
        inputs.append(adapter)
        adapters = read_adapter(local_copy(adapter), source.config)
    check_output_folder(target, args.overwrite, *inputs)
    params = source.load(Layout(make_mesh(MeshSettings())), dtype)
    if adapters:
        params = merge_adapters(merge_params(params, jax.tree.map(jnp.asarray, adapters)), dtype)
    return source, params
