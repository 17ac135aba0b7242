"""The public Python API: models, training, sources, tasks and rewards."""

from spatial_ssrl_jax import __version__
from spatial_ssrl_jax.config.load import load_config
from spatial_ssrl_jax.config.schema import MeshSettings
from spatial_ssrl_jax.data.sources import open_source
from spatial_ssrl_jax.data.videos import Video, open_video
from spatial_ssrl_jax.inference.policy import Policy, Response
from spatial_ssrl_jax.rl.rewards import Reward, score_answer
from spatial_ssrl_jax.rollout.sampling import Sampling
from spatial_ssrl_jax.tasks import TASKS
from spatial_ssrl_jax.trainer.training import train

__all__ = [
    "TASKS",
    "MeshSettings",
    "Policy",
    "Response",
    "Reward",
    "Sampling",
    "Video",
    "__version__",
    "load_config",
    "open_source",
    "open_video",
    "score_answer",
    "train",
]
