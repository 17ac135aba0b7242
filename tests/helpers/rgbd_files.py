"""Good RGB-D files of the kinds that `rgbd:` reads, to be damaged."""

from importlib.util import find_spec
from pathlib import Path

import h5py
import numpy as np
from PIL import Image

from tests.helpers.images import photo, room

HEIGHT, WIDTH = 60, 80
HAS_EXR = find_spec("OpenEXR") is not None


def write_depths(folder: Path) -> None:
    """An image each with a depth file of another format, and one with an image as its mask."""
    depth = room(0, HEIGHT, WIDTH)
    for name in "abcd":
        _save_image(folder / f"{name}.jpg")
    (folder / "a_depth.pfm").write_bytes(b"Pf\n80 60\n-1.0\n" + depth[::-1].tobytes())
    Image.fromarray(depth).save(folder / "b_depth.tif", compression="tiff_lzw")
    np.savez_compressed(folder / "c_depth.npz", depth=depth)
    np.save(folder / "d_depth.npy", depth)
    Image.fromarray(np.full(depth.shape, 255, np.uint8)).save(folder / "d_depth_mask.png")


def write_exr(folder: Path) -> None:
    import OpenEXR

    _save_image(folder / "a.jpg")
    header = {"compression": OpenEXR.ZIP_COMPRESSION, "type": OpenEXR.scanlineimage}
    exr = OpenEXR.File(header, {"Z": room(0, HEIGHT, WIDTH)})
    exr.write(str(folder / "a_depth.exr"))


def write_tum(folder: Path) -> None:
    depth = (5000 * room(0, HEIGHT, WIDTH)).astype(np.uint16)
    for name in ("rgb", "depth"):
        (folder / name).mkdir()
    for time in ("1.00", "2.00"):
        _save_image(folder / f"rgb/{time}.png")
        Image.fromarray(depth).save(folder / f"depth/{time}.png")
    text = "".join(f"{time} rgb/{time}.png {time} depth/{time}.png\n" for time in ("1.00", "2.00"))
    (folder / "associations.txt").write_text(text)


def write_labeled(folder: Path) -> None:
    with h5py.File(folder / "labeled.mat", "w") as file:
        file["images"] = photo(0, HEIGHT, WIDTH).transpose(2, 1, 0)[None]
        file["depths"] = room(0, HEIGHT, WIDTH).T[None]


def write_frames(folder: Path) -> None:
    for name in ("1", "2"):
        with h5py.File(folder / f"{name}.h5", "w") as file:
            file["rgb"] = photo(0, HEIGHT, WIDTH).transpose(2, 0, 1)
            file["depth"] = room(0, HEIGHT, WIDTH)


def _save_image(path: Path) -> None:
    Image.fromarray(photo(0, HEIGHT, WIDTH)).save(path)
