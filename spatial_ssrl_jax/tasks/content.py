"""Pictures without content: nearly black, nearly white, or of one colour.

What they show cannot be told, and so neither can the answer to a question about them. A picture's
contrast is the standard deviation of its thumbnail, in grey levels. Noise averages out: black,
white and single colours stay below 1.6 on a megapixel with noise of up to 40 levels, a covered lens
with vignetting below 1.2. The least of 236 photos, a third of them of low light (DICM, LIME, LOL),
is 8.5, a lit monument at night; the others are above 11. A smooth gradient has contrast, as a clear
sky has.
"""

import numpy as np
from PIL import Image

from spatial_ssrl_jax.tasks.example import Reject
from spatial_ssrl_jax.tasks.frame import inner_box
from spatial_ssrl_jax.tasks.patches import thumbnail

MIN_CONTRAST = 3.0  # default of the tasks' setting `min_contrast`
_SAMPLE = 2**18  # about as many pixels are examined, in whole rows
_MIN_ROWS = 64  # of them at least


def check_content(image: np.ndarray, min_contrast: float) -> None:
    """Checks that an image shows something.

    Args:
      image: [H, W, 3] uint8.
      min_contrast: see `contrast`; 0 allows any image.

    Raises:
      Reject: its contrast is lower.
    """
    if min_contrast > 0 and contrast(image) < min_contrast:
        raise Reject("without content")


def contrast(image: np.ndarray) -> float:
    """Standard deviation of an image's 16x16 thumbnail, in grey levels, over its three channels.

    A white or black frame is left out.
    """
    left, top, right, bottom = inner_box(image)
    inside = image[top:bottom, left:right]
    height, width = inside.shape[:2]
    step = max(1, min(height * width // _SAMPLE, height // _MIN_ROWS))
    small = thumbnail(Image.fromarray(inside[::step]))
    return float(np.sqrt(small.var(axis=(0, 1)).mean()))
