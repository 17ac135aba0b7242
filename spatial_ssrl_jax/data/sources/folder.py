"""`folder:PATH`: every image below a folder, without depth."""

from spatial_ssrl_jax.common.reading import READING, Reading
from spatial_ssrl_jax.data.sources.files import FileSource, is_image, list_files, require_images

LAYOUT = "a folder with .jpg, .jpeg, .png, .webp or .bmp images, at any depth of folders"


def open_folder(spec: str, path: str, reading: Reading = READING) -> FileSource:
    """Lists the images below `path`; raises `UserError` if there are none."""
    root, files = list_files(spec, path, LAYOUT)
    images = [file for file in files if is_image(file)]
    return FileSource(spec, root, require_images(spec, root, images, LAYOUT), None, reading)
