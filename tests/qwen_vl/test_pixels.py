"""Pixels are normalised on the device as Transformers' image processor normalises them."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from spatial_ssrl_jax.checkpoint.models import TINY, open_model
from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.qwen_vl.family import read_config
from spatial_ssrl_jax.qwen_vl.pixels import normalize_patches
from spatial_ssrl_jax.qwen_vl.qwen2_5 import Qwen2_5VisionConfig
from tests.conftest import SMALL_VISION

CLIP = Qwen2_5VisionConfig(**SMALL_VISION)
OTHER = replace(CLIP, image_mean=(0.5, 0.25, 0.1), image_std=(0.25, 0.3, 0.7))


@pytest.mark.parametrize("config", [CLIP, OTHER], ids=["CLIP's", "others"])
def test_every_byte_of_every_channel_is_the_references(config: Qwen2_5VisionConfig):
    image = np.arange(256, dtype=np.uint8).reshape(1, 16, 16).repeat(3, axis=0)
    reference, mean, std = Qwen2VLImageProcessorPil(), config.image_mean, config.image_std
    expected = reference.normalize(reference.rescale(image, 1 / 255), list(mean), list(std))
    found = jax.jit(lambda x: normalize_patches(x, config))(image.reshape(1, -1))
    np.testing.assert_array_equal(found[0], expected.ravel())


def test_tpus_differ_in_the_last_bit_at_most(monkeypatch: pytest.MonkeyPatch):
    image = np.arange(256, dtype=np.uint8)[None].repeat(3, axis=0).reshape(1, -1)
    expected = np.asarray(normalize_patches(image, CLIP))
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda x, tpu, default: tpu(x))
    found = jax.jit(lambda x: normalize_patches(x, CLIP))(image)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2.4e-7)


def test_mean_and_deviation_are_the_folders(tmp_path: Path):
    assert open_model("tiny").config.vision.image_std == (0.25, 0.25, 0.25)
    (tmp_path / "config.json").write_text((TINY / "config.json").read_text())
    assert read_config(tmp_path).vision.image_std == CLIP.image_std  # without a processor's file
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps({"image_mean": [0.1, 0.2, 0.3]}))
    assert read_config(tmp_path).vision.image_mean == (0.1, 0.2, 0.3)
    path.write_text("[]")
    with pytest.raises(UserError, match="preprocessor_config.json holds no JSON object"):
        read_config(tmp_path)
