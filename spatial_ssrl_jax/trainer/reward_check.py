"""Checks before a run that a right response earns its reward."""

from contextlib import closing
from dataclasses import replace

import grain

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.common.text import shown
from spatial_ssrl_jax.config.schema import Config
from spatial_ssrl_jax.data.processor import Processor
from spatial_ssrl_jax.eval.heldout_items import heldout_items
from spatial_ssrl_jax.rl.scorer import SampledGroup, Scorer, make_scorer
from spatial_ssrl_jax.tasks.example import Example
from spatial_ssrl_jax.tasks.protocol import response_text


def check_rewards(
    config: Config, datasets: dict[str, grain.MapDataset], processor: Processor
) -> None:
    """Checks one example of each task; see `task_datasets`.

    Raises:
      UserError: see `check_reward`.
    """
    settings = replace(config.reward, workers=1, max_failed_fraction=1.0)
    with closing(make_scorer(settings, config.all_tasks)) as scorer:
        for items in heldout_items(datasets, 1, (), lambda _: None).values():
            check_reward(items[0].example, processor, scorer)


def check_reward(example: Example, processor: Processor, scorer: Scorer) -> None:
    """Encodes, decodes and scores a right response in the required format.

    Args:
      example: of any task.
      processor: of the run's model.
      scorer: of the run's settings.

    Raises:
      UserError: it does not earn accuracy and format, or `reward.function` fails.
    """
    ids = processor.encode_response(response_text(example.reason, example.answer))
    text = processor.decode(ids)
    ((reward,),) = scorer.score([SampledGroup(example, [text], [len(ids)])])
    if reward.failure:
        raise UserError(
            f"reward.function fails for a right response to a {example.task} question: "
            f"{reward.failure}: fix it."
        )
    if scorer.settings.function is None and min(reward.accuracy, reward.format) < 1:
        lacks = "the answer" if reward.accuracy < 1 else "the format"
        raise UserError(
            f"the rule {scorer.settings.rule_of(example.task)} does not accept {lacks} of a right "
            f"response to a {example.task} question, which the tokenizer and chat template of "
            f"{processor.folder} make {shown(text, 200)}: choose another reward.rule, or "
            "reward.question_rule for questions of your own, or another model's files."
        )
