"""Packs an image folder for pods: python -m spatial_ssrl_jax.prepare KIND SRC DST"""

import argparse
import contextlib
import io
import json
import tempfile
from collections.abc import Sequence

from spatial_ssrl_jax.common.errors import UserError, run_command
from spatial_ssrl_jax.common.outputs import check_inputs
from spatial_ssrl_jax.common.paths import user_path
from spatial_ssrl_jax.data.sources.files import FileSource

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
    parser.add_argument("src", help="the folder that is read")
    parser.add_argument("dst", help="the folder that is written; may begin with gs://")
    parser.add_argument(
        "--max-bad-fraction", type=float, default=0.2, help="stop above this fraction of bad images"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what was written before")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)

    source = KINDS[args.kind](f"{args.kind}:{args.src}", args.src)
    if "://" in args.dst:  # ArrayRecord's writer knows local files alone
        with tempfile.TemporaryDirectory() as local:
            written, skipped, folder = _write(args, source, local, args.dst)
    else:
        written, skipped, folder = _write(args, source, args.dst)
    spec = f"tfds:ssrl_pictures/{args.kind}@{args.dst}"
    if args.json:
        report = {"source": spec, "folder": folder, "written": written, "skipped": skipped}
        print(json.dumps(report))
        return
    for reason in skipped[:_MAX_NAMED]:
        print(f"skipped {reason}")
    print(f"{folder}: {written} images, {len(skipped)} skipped; read it with --source={spec}")


def _write(
    args: argparse.Namespace, source: FileSource, local: str, remote: str | None = None
) -> tuple[int, list[str], str]:
    """Runs the builder.

    Args:
      args: the command line.
      source: the images.
      local: folder that the builder writes.
      remote: folder to copy the result to, or None.

    Returns:
      The number of images written, why others were skipped, and the folder.
    """
    import tensorflow_datasets as tfds

    from spatial_ssrl_jax.data.builder.ssrl_pictures import SsrlPictures

    tfds.disable_progress_bar()
    builder = SsrlPictures(
        source=source, config=args.kind, data_dir=local, file_format="array_record"
    )
    path = builder.data_path
    target = user_path(remote) / path.relative_to(local) if remote else path
    check_inputs(target, *source.inputs)
    if target.exists():
        if not args.overwrite:
            raise UserError(
                f"{target} is there already: choose another folder or give --overwrite."
            )
        target.rmtree()
    for leftover in path.parent.glob(f"incomplete.*_{path.name}"):  # of a killed process
        leftover.rmtree()
    # TFDS makes a folder of downloads though there are none, and prints to stdout.
    with tempfile.TemporaryDirectory() as downloads, contextlib.redirect_stdout(io.StringIO()):
        try:
            builder.download_and_prepare(download_dir=downloads)
        except AssertionError:  # TFDS's, without a single example
            if len(builder.skipped) < len(source):
                raise
    skipped = builder.skipped
    written = len(source) - len(skipped)
    if not written or len(skipped) > args.max_bad_fraction * len(source):
        if path.exists():
            path.rmtree()
        raise UserError(
            f"{len(skipped)} of {len(source)} images below {args.src} could not be used (first: "
            f"{skipped[0].rstrip('.')}): fix them, or raise --max-bad-fraction."
        )
    if remote:
        target.mkdir(parents=True, exist_ok=True)
        for file in path.iterdir():
            file.copy(target / file.name)
    return written, skipped, str(target)


if __name__ == "__main__":
    run_command(main)
