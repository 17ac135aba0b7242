"""How RGB-D data sets lay out their files: from a listing to pairs of an image and its depth.

Each layout is a function of a listing, and knows its files by their names alone.
"""

import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from spatial_ssrl_jax.data.sources.depth_files import DEPTH_ENDINGS
from spatial_ssrl_jax.data.sources.files import is_image
from spatial_ssrl_jax.data.sources.listing import Listing, base, parent

_MASK_ENDINGS = (".npy", ".png")
_SECONDS = 0.02  # that an image and its depth may be apart, as TUM's own tool has it
_ASSOCIATIONS = ("associations", "association", "associate", "assoc")
# A word in a name that says what a file or folder holds; without it, the names of both are equal.
_IMAGE_WORD = re.compile(r"(?<![a-z])(?:rgb|colou?r|image|img)s?(?![a-z])", re.IGNORECASE)
_DEPTH_WORD = re.compile(r"(?<![a-z])depths?(?![a-z])", re.IGNORECASE)
_ARKIT = {"lowres_wide": "lowres_depth", "wide": "highres_depth"}
_PROJECTED = re.compile(r"(?:^|/)([^/]+)/proj_depth/groundtruth/(image_\d\d)/$")
_RAW = re.compile(r"(?:^|/)([^/]+)/(image_\d\d)/data/$")


@dataclass(frozen=True, slots=True)
class Pair:
    """An image and its depth, as paths relative to the source's folder.

    Attributes:
      image, depth: the two files.
      mask: of the depth's valid pixels, where there is one.
      decode: stored values [H, W] -> metres [H, W] float32, where they have a unit or code of their
        own. A module's function, so that it pickles.
    """

    image: str
    depth: str
    mask: str | None = None
    decode: Callable[[np.ndarray], np.ndarray] | None = None


def beside(listing: Listing) -> Iterator[Pair]:
    """`NAME.jpg` with `NAME_depth.png` beside it, perhaps with `NAME_depth_mask.npy` or `.png`."""
    for folder in listing.folders:
        for stem, image in listing.images(folder):
            if depth := listing.find(folder, f"{stem}_depth", DEPTH_ENDINGS):
                mask = listing.find(folder, f"{stem}_depth_mask", _MASK_ENDINGS)
                yield Pair(image, depth, mask)


def words(listing: Listing) -> Iterator[Pair]:
    """7-Scenes' `frame-000000.color.png` with `frame-000000.depth.png`, or with such words."""
    for folder in listing.folders:
        images = ((s, image) for s, image in listing.images(folder) if not _is_depth(s))
        depths = ((s, d) for s, d in listing.entries(folder, DEPTH_ENDINGS) if _is_depth(s))
        yield from _by_key(images, depths)


def tum(listing: Listing) -> Iterator[Pair]:
    """TUM RGB-D's `rgb/` with `depth/`, paired by `associations.txt`, else by timestamps."""
    for folder in listing.named("rgb"):
        top = parent(folder)
        pairs = _associated(listing, top) or _nearest(listing, folder, f"{top}depth/")
        yield from (Pair(image, depth, decode=tum_metres) for image, depth in pairs)


def sun(listing: Listing) -> Iterator[Pair]:
    """SUN RGB-D's folders of one image in `image/` and one depth in `depth/` or `depth_bfx/`.

    Its bits are another order in one's own depth, so one of its files alone, such as
    `intrinsics.txt`, does not make it this.
    """
    for folder in listing.named("image"):
        top = parent(folder)
        texts = (listing.find(top, stem, (".txt",)) for stem in ("intrinsics", "scene"))
        if not all(texts) and f"{top}depth_bfx/" not in listing.folders:
            continue
        images = [image for _, image in listing.images(folder)]
        as_measured, filled = (
            [depth for _, depth in listing.entries(f"{top}{name}/", DEPTH_ENDINGS)]
            for name in ("depth", "depth_bfx")
        )
        if len(images) == 1 and len(as_measured or filled) == 1:
            yield Pair(images[0], (as_measured or filled)[0], decode=sun_metres)


def hypersim(listing: Listing) -> Iterator[Pair]:
    """Hypersim's `X_final_preview/N.tonemap.jpg` with `X_geometry_hdf5/N.depth_meters.hdf5`.

    This depth is along the ray.
    """
    for folder in listing.folders:
        depths = f"{folder[:-1].removesuffix('_final_preview')}_geometry_hdf5/"
        for stem, image in listing.images(folder) if depths in listing.folders else ():
            name = f"{stem.removesuffix('.tonemap')}.depth_meters"
            if depth := listing.find(depths, name, (".hdf5",)):
                yield Pair(image, depth)


def kitti(listing: Listing) -> Iterator[Pair]:
    """KITTI's selected `image/` with `groundtruth_depth/`, and its drives.

    A drive's `image_02/data/N.png` goes with its `proj_depth/groundtruth/image_02/N.png`, which is
    unpacked into another folder.
    """
    for folder in listing.named("image"):
        depths = f"{parent(folder)}groundtruth_depth/"
        for stem, image in listing.images(folder):
            name = stem.replace("_image_", "_groundtruth_depth_", 1)
            if depth := listing.find(depths, name, (".png",)):
                yield Pair(image, depth, decode=kitti_metres)
    found = ((_PROJECTED.search(folder), folder) for folder in listing.folders)
    drives = {match.groups(): folder for match, folder in found if match}
    for folder in listing.folders if drives else ():
        match = _RAW.search(folder)
        depths = drives.get(match.groups(), "") if match else ""
        for stem, image in listing.images(folder) if depths else ():
            if depth := listing.find(depths, stem, (".png",)):
                yield Pair(image, depth, decode=kitti_metres)


def folders(listing: Listing) -> Iterator[Pair]:
    """ScanNet's `color/N.jpg` with `depth/N.png`, ARKitScenes', and others with such names."""
    depths: dict[tuple[str, str], list[str]] = {}  # by parent and key
    for folder in listing.folders:
        name = base(folder)
        if _is_depth(name) and not _IMAGE_WORD.search(name):  # as of depth in colours
            depths.setdefault((parent(folder), _key(name)), []).append(folder)
    for folder in listing.folders if depths else ():
        name = base(folder)
        key = parent(folder), _key(_ARKIT.get(name, name))
        if _is_depth(name) or name == "imgs":  # MegaDepth's, whose own kind rejects ordinal maps
            continue
        for other in depths.get(key, ()):
            yield from _by_key(listing.images(folder), listing.entries(other, DEPTH_ENDINGS))


OWN = "NAME_depth beside NAME"
LAYOUTS = {
    OWN: beside,
    "7-Scenes": words,
    "TUM RGB-D": tum,
    "SUN RGB-D": sun,
    "Hypersim": hypersim,
    "KITTI depth": kitti,
    "ScanNet or ARKitScenes": folders,
}


def find_pairs(listing: Listing) -> dict[str, list[Pair]]:
    """The pairs of each layout that is there; the first one of an image holds."""
    found: dict[str, list[Pair]] = {}
    known: set[str] = set()
    for name, layout in LAYOUTS.items():
        for pair in layout(listing):
            if pair.image not in known:
                known.add(pair.image)
                found.setdefault(name, []).append(pair)
    return found


def tum_metres(values: np.ndarray) -> np.ndarray:
    """TUM RGB-D's values are 5000 a metre."""
    return _per_metre(values, 5000)


def kitti_metres(values: np.ndarray) -> np.ndarray:
    """KITTI's values are 256 a metre."""
    return _per_metre(values, 256)


def sun_metres(values: np.ndarray) -> np.ndarray:
    """SUN RGB-D's values are 16 bits of millimetres, rotated left by 3."""
    if values.dtype.kind not in "iu":
        return _per_metre(values, 1)
    bits = values.astype(np.uint16)
    return _per_metre((bits >> 3) | (bits << 13), 1000)


def _per_metre(values: np.ndarray, units: float) -> np.ndarray:
    """Integers in a unit as metres; floating-point values are metres already."""
    metres = values.astype(np.float32)
    return metres / np.float32(units) if values.dtype.kind in "iu" else metres


def _by_key(images: Iterable[tuple[str, str]], depths: Iterable[tuple[str, str]]) -> Iterator[Pair]:
    """Pairs of (stem, path) whose stems differ at most by the word that says what they hold."""
    by_key: dict[str, str] = {}
    for stem, depth in depths:
        by_key.setdefault(_key(stem), depth)
    for stem, image in images if by_key else ():
        if depth := by_key.get(_key(stem)):
            yield Pair(image, depth)


def _is_depth(name: str) -> bool:
    return _DEPTH_WORD.search(name) is not None


def _key(name: str) -> str:
    """A name without the words that say what it holds."""
    parts = re.split(r"[-_. ]+", _DEPTH_WORD.sub("", _IMAGE_WORD.sub("", name)))
    return ".".join(filter(None, parts))


def _associated(listing: Listing, top: str) -> list[tuple[str, str]]:
    """Pairs of lines `time file time file`, of image and depth in any order."""
    pairs = []
    files = (listing.find(top, stem, (".txt",)) for stem in _ASSOCIATIONS)
    file = next(filter(None, files), None)
    for line in listing.lines(file) if file else ():
        paths = [f"{top}{word.removeprefix('./')}" for word in line.split()[1::2]]
        paths.sort(key=lambda path: path.startswith(f"{top}depth/"))
        if len(paths) == 2 and is_image(paths[0]) and all(path in listing for path in paths):
            pairs.append((paths[0], paths[1]))
    return pairs


def _nearest(listing: Listing, folder: str, depths: str) -> list[tuple[str, str]]:
    """Each image with the depth nearest in time, where names are seconds."""
    entries = listing.entries(depths, DEPTH_ENDINGS)
    by_time = sorted((float(stem), depth) for stem, depth in entries if _is_seconds(stem))
    times, pairs = [time for time, _ in by_time], []
    for stem, image in listing.images(folder):
        if by_time and _is_seconds(stem):
            time = float(stem)
            at = bisect_left(times, time)
            nearest = min(by_time[max(at - 1, 0) : at + 1], key=lambda found: abs(found[0] - time))
            if abs(nearest[0] - time) <= _SECONDS:
                pairs.append((image, nearest[1]))
    return pairs


def _is_seconds(stem: str) -> bool:
    return re.fullmatch(r"\d+\.\d+", stem) is not None
