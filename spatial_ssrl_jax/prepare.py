"""Packs a picture folder for pods: python -m spatial_ssrl_jax.prepare KIND SRC DST"""

import argparse
import contextlib
import io
import json
import tempfile
from collections.abc import Sequence

from spatial_ssrl_jax.errors import UserError, run_command

_NAMED = 10  # skipped pictures that are named


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m spatial_ssrl_jax.prepare",
        description="Writes a folder of pictures, with depth where the kind has it, as a TFDS data "
        "set of few large ArrayRecord files.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    from spatial_ssrl_jax.data.builder.ssrl_pictures import KINDS

    parser.add_argument("kind", choices=list(KINDS), help="the folder's layout; coco: any pictures")
    parser.add_argument("src", help="the folder that is read")
    parser.add_argument("dst", help="the folder that is written; may begin with gs://")
    parser.add_argument(
        "--max-bad-share", type=float, default=0.2, help="stop above this share of bad pictures"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what was written before")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)

    source = KINDS[args.kind](f"{args.kind}:{args.src}", args.src)
    written, skipped, folder = _write(args, source)
    spec = f"tfds:ssrl_pictures/{args.kind}@{args.dst}"
    if args.json:
        report = {"source": spec, "folder": folder, "written": written, "skipped": skipped}
        print(json.dumps(report))
        return
    for reason in skipped[:_NAMED]:
        print(f"skipped {reason}")
    print(f"{folder}: {written} pictures, {len(skipped)} skipped; read it with --source={spec}")


def _write(args: argparse.Namespace, source) -> tuple[int, list[str], str]:
    """Runs the builder; gives pictures written, why others were skipped, and the folder."""
    import tensorflow_datasets as tfds

    from spatial_ssrl_jax.data.builder.ssrl_pictures import SsrlPictures

    tfds.disable_progress_bar()
    builder = SsrlPictures(
        source=source, config=args.kind, data_dir=args.dst, file_format="array_record"
    )
    if builder.data_path.exists():
        if not args.overwrite:
            raise UserError(
                f"{builder.data_path} is there already: choose another folder or give --overwrite."
            )
        builder.data_path.rmtree()
    # TFDS makes a folder of downloads though nothing comes, and speaks on stdout.
    with tempfile.TemporaryDirectory() as downloads, contextlib.redirect_stdout(io.StringIO()):
        builder.download_and_prepare(download_dir=downloads)
    written, skipped = builder.info.splits["train"].num_examples, builder.skipped
    if not written or len(skipped) > args.max_bad_share * len(source):
        builder.data_path.rmtree()
        raise UserError(
            f"{len(skipped)} of {len(source)} pictures below {args.src} could not be used (first: "
            f"{skipped[0].rstrip('.')}): mend them, or raise --max-bad-share."
        )
    return written, skipped, str(builder.data_path)


if __name__ == "__main__":
    run_command(main)
