"""Packs an image folder for pods: python -m spatial_ssrl_jax.prepare KIND SRC DST"""

import argparse
import contextlib
import io
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from spatial_ssrl_jax.common.errors import UserError, disk_problem, run_command
from spatial_ssrl_jax.common.lock import locked
from spatial_ssrl_jax.common.outputs import check_inputs, check_writable
from spatial_ssrl_jax.common.paths import in_bucket, partial_name, user_path
from spatial_ssrl_jax.common.reading import READING
from spatial_ssrl_jax.common.text import error_line, printable
from spatial_ssrl_jax.data.sources.base import Source
from spatial_ssrl_jax.data.sources.options import open_with_options
from spatial_ssrl_jax.tasks import TASKS

_MAX_NAMED = 10  # skipped images in the output


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m spatial_ssrl_jax.prepare",
        description="Writes a folder of images, with depth where the kind has it, as a TFDS data "
        "set of a few large ArrayRecord files.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    from spatial_ssrl_jax.data.builder.ssrl_pictures import KINDS

    parser.add_argument("kind", choices=list(KINDS), help="the folder's layout; coco: any images")
    parser.add_argument(
        "src", help="the folder that is read, perhaps with ,depth=… or ,exif=… as in a SPEC"
    )
    parser.add_argument("dst", help="the folder that is written; may begin with gs://")
    parser.add_argument(
        "--max-bad-fraction", type=float, default=0.2, help="stop above this fraction of bad images"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what was written before")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    if not 0 <= args.max_bad_fraction < 1:
        raise UserError("--max-bad-fraction must be at least 0 and below 1.")

    spec = f"{args.kind}:{args.src}"
    source = open_with_options(KINDS[args.kind], spec, args.src, READING)
    if "://" in args.dst:  # ArrayRecord's writer knows local files alone
        with tempfile.TemporaryDirectory() as local:
            written, skipped, folder = _write(args, source, Path(local))
    else:
        place = Path(user_path(args.dst))
        check_writable(place)
        place.mkdir(parents=True, exist_ok=True)
        with locked(place, lambda text: print(text, file=sys.stderr)):
            local = Path(partial_name(place / "prepare"))
            shutil.rmtree(local, ignore_errors=True)  # what a killed process left
            try:
                written, skipped, folder = _write(args, source, local)
            finally:
                shutil.rmtree(local, ignore_errors=True)
    spec = f"{_tasks(source)}tfds:ssrl_pictures/{args.kind}@{args.dst}"
    if args.json:
        report = {"source": spec, "folder": folder, "written": written, "skipped": skipped}
        print(json.dumps(report))
        return
    for reason in skipped[:_MAX_NAMED]:
        print(f"skipped {printable(reason)}")
    line = f"{folder}: {written} images, {len(skipped)} skipped; read it with --source={spec}"
    print(printable(line))


def _tasks(source: Source) -> str:
    """The tasks to write before the packed set's SPEC, where its depth does not serve all."""
    if not source.has_depth or source.has_distances:
        return ""
    return ",".join(task.name for task in TASKS if not task.needs_distances) + "@"


def _write(args: argparse.Namespace, source: Source, local: Path) -> tuple[int, list[str], str]:
    """Runs the builder, and replaces the target when all is written.

    Args:
      args: the command line.
      source: the images.
      local: folder that the builder writes.

    Returns:
      The number of images written, why others were skipped, and the folder.
    """
    import tensorflow_datasets as tfds

    from spatial_ssrl_jax.data.builder.ssrl_pictures import SsrlPictures

    tfds.disable_progress_bar()
    builder = SsrlPictures(
        source=source, config=args.kind, data_dir=str(local), file_format="array_record"
    )
    path = builder.data_path
    target = user_path(args.dst) / path.relative_to(local)
    check_inputs(target, *source.inputs)
    if target.exists() and not args.overwrite:
        raise UserError(f"{target} is there already: choose another folder or give --overwrite.")
    # TFDS makes a folder of downloads though there are none, and prints to stdout.
    with tempfile.TemporaryDirectory() as downloads, contextlib.redirect_stdout(io.StringIO()):
        try:
            builder.download_and_prepare(download_dir=downloads)
        except AssertionError:  # TFDS's, without a single example
            if len(builder.skipped) < len(source):
                raise
        except (OSError, RuntimeError) as error:
            why = disk_problem(error) or error_line(error)
            raise UserError(
                f"{args.dst} cannot be written ({why}): free space there, or choose another folder."
            ) from error
    skipped = builder.skipped
    written = len(source) - len(skipped)
    if not written or len(skipped) > args.max_bad_fraction * len(source):
        raise UserError(
            f"{len(skipped)} of {len(source)} images below {args.src} could not be used (first: "
            f"{skipped[0].rstrip('.')}): fix them, or raise --max-bad-fraction."
        )
    if target.exists():
        target.rmtree()
    target.parent.mkdir(parents=True, exist_ok=True)
    if in_bucket(target):
        target.mkdir(parents=True, exist_ok=True)
        for file in path.iterdir():
            file.copy(target / file.name)
    else:
        path.rename(target)
    return written, skipped, str(target)


if __name__ == "__main__":
    run_command(main)
