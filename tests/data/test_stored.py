"""ArrayRecord files: what `prepare` writes, `tfds:` and `arrayrecord:` read back to the bit."""

import json
import os
import pickle
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
from etils.epath import backend
from PIL import Image, ImageFile

from spatial_ssrl_jax import prepare
from spatial_ssrl_jax.common.errors import BadImage, UserError
from spatial_ssrl_jax.data.sources import open_source
from spatial_ssrl_jax.data.sources.stored import StoredSource
from tests.conftest import ROOT
from tests.data.test_sources import HEIGHT, WIDTH, ramp, save_depth, save_image
from tests.helpers.fake_storage import Storage


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two RGB-D images, one of them JPEG with its depth of another size, and a damaged one."""
    folder = tmp_path_factory.mktemp("in")
    save_image(folder / "a.jpg")
    save_depth(folder / "a_depth.npy", ramp((6, 8)))
    save_image(folder / "room" / "b.png")
    save_depth(folder / "room" / "b_depth.png", ramp())
    (folder / "c.png").write_bytes(b"no image")
    save_depth(folder / "c_depth.npy", ramp())
    return folder


@pytest.fixture(scope="module")
def prepared(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out")
    prepare.main(["rgbd", str(folder), str(out), "--max-bad-fraction=0.5"])
    return out


def specs(prepared: Path) -> list[str]:
    files = prepared / "ssrl_pictures" / "rgbd" / "1.0.0"
    return [
        f"tfds:ssrl_pictures/rgbd@{prepared}",
        f"tfds:ssrl_pictures/rgbd:1.0.0:train@{prepared}",
        f"arrayrecord:{files}/*.array_record*",
    ]


@pytest.mark.parametrize("which", range(3))
def test_what_is_read_back_equals_the_folder(folder: Path, prepared: Path, which: int):
    original = open_source(f"rgbd:{folder}")
    kept = [i for i in range(len(original)) if original.name(i) != "c.png"]
    source = pickle.loads(pickle.dumps(open_source(specs(prepared)[which])))
    assert len(source) == len(kept) == 2 and source.has_depth
    for index, number in enumerate(kept):
        before, after = original[number], source[index]
        np.testing.assert_array_equal(after.image, before.image)
        np.testing.assert_array_equal(after.depth, before.depth)
        assert source.size(index) == before.image.shape[:2]
        assert after.name == source.name(index) and after.path == before.name
    assert source.name(0) != source.name(1)


def test_a_size_decodes_neither_image_nor_depth(prepared: Path, monkeypatch: pytest.MonkeyPatch):
    source = open_source(specs(prepared)[0])
    decoded = []

    def watch(owner: Any, method: str) -> None:
        original = getattr(owner, method)

        def watched(*args: Any, **kwargs: Any) -> Any:
            decoded.append(owner)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, method, watched)

    watch(ImageFile.ImageFile, "load")
    watch(zlib, "decompress")
    assert [source.size(i) for i in range(2)] == [(HEIGHT, WIDTH)] * 2 and not decoded
    source[1]
    assert set(decoded) == {ImageFile.ImageFile, zlib}


def test_splits_are_slices(prepared: Path):
    source = open_source(f"tfds:ssrl_pictures/rgbd:train[50%:]@{prepared}")
    assert len(source) == 1 and source[0].path == "room/b.png"


def test_a_record_out_of_range_is_an_index_error(prepared: Path):
    with pytest.raises(IndexError):
        open_source(specs(prepared)[0]).name(2)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("tfds:", "cannot be understood"),
        ("tfds:no_such_set@OUT", "no_such_set not found"),
        ("tfds:ssrl_pictures/rgbd:test@OUT", "Unknown split 'test'"),
        ("arrayrecord:OUT/none*", "no file matches"),
        ("arrayrecord:OUT/*.array_record", "features.json is missing"),
    ],
)
def test_what_cannot_be_opened_is_named(prepared: Path, tmp_path: Path, spec: str, message: str):
    out = prepared
    if "features" in message:
        (tmp_path / "a.array_record").write_bytes(b"x")
        out = tmp_path
    with pytest.raises(UserError, match=message) as error:
        open_source(spec.replace("OUT", str(out)))
    assert spec.split(":")[0] in str(error.value) and not isinstance(error.value, BadImage)


@pytest.mark.parametrize(
    "spec", ["arrayrecord:gs://bucket/x*.array_record", "tfds:ssrl_pictures/rgbd@gs://bucket/data"]
)
def test_gs_without_its_extra_says_what_to_install(spec: str, monkeypatch: pytest.MonkeyPatch):
    def absent(*_):
        raise ImportError("Install gcsfs")

    monkeypatch.setattr(backend.fsspec_backend, "fs", absent)
    with pytest.raises(UserError, match=r"extra \[gcs\].*pip install.*local folder") as error:
        open_source(spec)
    assert spec in str(error.value) and "\n" not in str(error.value)


def test_prepare_reports_and_never_overwrites_unasked(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    argv = ["rgbd", str(folder), str(tmp_path), "--json", "--max-bad-fraction=0.5"]
    prepare.main(argv)
    report = json.loads(capsys.readouterr().out)
    assert report["source"] == f"tfds:ssrl_pictures/rgbd@{tmp_path}" and report["written"] == 2
    assert len(report["skipped"]) == 1 and "c.png" in report["skipped"][0]
    with pytest.raises(UserError, match="--overwrite"):
        prepare.main(argv)
    left = tmp_path / ".prepare.partial" / "half"  # of a killed process
    left.parent.mkdir()
    left.touch()
    before = sorted(tmp_path.rglob("*.array_record*"))
    with pytest.raises(UserError, match="could not be used"):
        prepare.main([*argv[:-1], "--overwrite", "--max-bad-fraction=0.1"])
    assert sorted(tmp_path.rglob("*.array_record*")) == before, "the old one stays"
    prepare.main([*argv, "--overwrite"])
    assert os.listdir(tmp_path) == ["ssrl_pictures"]
    with pytest.raises(UserError, match="--max-bad-fraction must be at least 0"):
        prepare.main([*argv[:-1], "--max-bad-fraction=-1"])


def test_prepare_never_replaces_what_it_reads(tmp_path: Path):
    target = tmp_path / "ssrl_pictures" / "coco" / "1.0.0"
    target.mkdir(parents=True)
    save_image(target / "a.jpg")
    with pytest.raises(UserError, match="holds what is read"):
        prepare.main(["coco", str(target), str(tmp_path), "--overwrite"])
    assert (target / "a.jpg").exists()


def test_prepare_stops_when_too_much_is_bad(folder: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"1 of 3 images .*c\.png.*--max-bad-fraction"):
        prepare.main(["rgbd", str(folder), str(tmp_path)])
    assert not list(tmp_path.rglob("*.array_record*"))


def test_coco_keeps_the_files_bytes_and_needs_no_depth(tmp_path: Path):
    save_image(tmp_path / "in" / "a.jpg")
    prepare.main(["coco", str(tmp_path / "in"), str(tmp_path / "out")])
    source = open_source(f"tfds:ssrl_pictures/coco@{tmp_path / 'out'}")
    assert not source.has_depth and source[0].depth is None
    with Image.open(tmp_path / "in" / "a.jpg") as image:
        np.testing.assert_array_equal(source[0].image, np.asarray(image))


def test_the_layout_of_coco_in_the_catalogue(tmp_path: Path):
    """Features as the catalogue publishes coco/2017; only image and file name are decoded."""
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(encoding_format="jpeg"),
            "image/filename": tfds.features.Text(),
            "image/id": np.int64,
            "objects": tfds.features.Sequence(
                {
                    "id": np.int64,
                    "area": np.int64,
                    "bbox": tfds.features.BBoxFeature(),
                    "label": tfds.features.ClassLabel(num_classes=80),
                    "is_crowd": np.bool_,
                }
            ),
        }
    )
    save_image(tmp_path / "a.jpg")
    things = {"id": 7, "area": 5, "bbox": tfds.features.BBox(0.0, 0.0, 1.0, 1.0), "label": 3}
    row = {
        "image": (tmp_path / "a.jpg").read_bytes(),
        "image/filename": "000000000009.jpg",
        "image/id": 9,
        "objects": [things | {"is_crowd": False}],
    }
    stored = features.serialize_example(features.encode_example(row))
    source = StoredSource("tfds:coco/2017", "coco/2017:1.1.0/train", [stored], features, ())
    assert source.size(0) == (HEIGHT, WIDTH) and not source.has_depth
    record = source[0]
    assert (record.path, record.name) == ("000000000009.jpg", "coco/2017:1.1.0/train/00000000")
    with Image.open(tmp_path / "a.jpg") as image:
        np.testing.assert_array_equal(record.image, np.asarray(image))


def test_tensorflow_is_never_imported(prepared: Path):
    code = (
        "import sys; from spatial_ssrl_jax import prepare; "
        "from spatial_ssrl_jax.data.sources import open_source; "
        f"open_source({specs(prepared)[0]!r})[0]; assert 'tensorflow' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_bucket_gets_what_a_folder_would(folder: Path, prepared: Path, bucket: Storage):
    argv = ["rgbd", str(folder), "gs://bucket/data", "--max-bad-fraction=0.5"]
    prepare.main(argv)
    built = [p.relative_to(prepared) for p in prepared.glob("*/rgbd/**/*") if p.is_file()]
    assert built and bucket.names("bucket") == sorted(f"data/{path}" for path in built)
    ours = open_source("tfds:ssrl_pictures/rgbd@gs://bucket/data")
    theirs = open_source(specs(prepared)[0])
    assert len(ours) == 2
    for index in range(2):
        np.testing.assert_array_equal(ours[index].image, theirs[index].image)
    with pytest.raises(UserError, match="is there already"):
        prepare.main(argv)


def test_a_bucket_without_its_extra_is_a_sentence(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UserError, match=r"gs://none.*\[gcs\]"):
        prepare.main(["rgbd", str(folder), "gs://none/x"])
