"""Converts: python -m spatial_ssrl_jax.convert to-orbax|to-hf SRC DST"""

import argparse
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import jax
from flax import traverse_util

from spatial_ssrl_jax.config import MeshSettings
from spatial_ssrl_jax.errors import run_command
from spatial_ssrl_jax.run import models
from spatial_ssrl_jax.run.checkpoint import PARAMS, save_params
from spatial_ssrl_jax.run.mesh import Layout, make_mesh


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m spatial_ssrl_jax.convert",
        description="Turns a Hugging Face folder into an Orbax checkpoint, and back.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("direction", choices=("to-orbax", "to-hf"))
    parser.add_argument("source", help="folder, checkpoint or hub id to read")
    parser.add_argument("target", type=Path, help="folder to write")
    parser.add_argument("--dtype", choices=("keep", "float32", "bfloat16"), default="keep")
    parser.add_argument("--overwrite", action="store_true", help="replace what the folder holds")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)

    source = models.open_model(args.source)
    models.claim_folder(args.target, args.overwrite, source.weights, source.files)
    layout = Layout(make_mesh(MeshSettings()))
    params = source.load(layout, None if args.dtype == "keep" else args.dtype)
    dtype = args.dtype if args.dtype != "keep" else str(jax.tree.leaves(params)[0].dtype)
    if args.direction == "to-hf":
        models.export(source, params, args.target, dtype)
    else:
        _write_orbax(source, params, args.target, dtype)
    count = sum(x.size for x in jax.tree.leaves(params))
    if args.json:
        report = {"target": str(args.target), "parameters": count, "dtype": dtype}
        print(json.dumps(report | {"tensors": len(traverse_util.flatten_dict(params))}))
    else:
        print(f"{args.target}: {count:,} parameters in {dtype}")


def _write_orbax(source: models.ModelFolder, params, target: Path, dtype: str) -> None:
    """Writes weights and the model's files; the folder appears when it is complete."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        models.copy_files(source, partial)
        models.write_config(source.config, partial, dtype)
        save_params(partial / PARAMS, params)
        partial.chmod(0o755)
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


if __name__ == "__main__":
    run_command(main)
