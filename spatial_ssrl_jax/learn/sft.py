"""The cold start: supervised responses in the required form."""

import numpy as np

from spatial_ssrl_jax.data.batching import bucket, pad_responses
from spatial_ssrl_jax.data.pipeline import Batch
from spatial_ssrl_jax.data.prompts import Processor
from spatial_ssrl_jax.learn.batch import ResponseBatch
from spatial_ssrl_jax.run.mesh import total
from spatial_ssrl_jax.tasks.protocol import response_text


def response_batch(batch: Batch, processor: Processor, limit: int) -> ResponseBatch:
    """The cold-start responses of a batch as groups of one, NumPy arrays.

    A response that the data brings is learned from as it is; else one is made of the example's
    reason and answer.

    Args:
      batch: b prompts with their examples.
      processor: encodes the responses.
      limit: R; a longer response is a `UserError`.
    """
    responses = []
    for item in batch.items:
        example = item.example
        text = example.response or response_text(example.reason, example.answer)
        responses.append([processor.encode_response(text)])
    bucket(max(len(r[0]) for r in responses), (limit,), "rollout.limit")
    tokens, length = pad_responses(responses, limit)
    count = np.float32(total(length.sum()))
    return ResponseBatch(
        batch.prompts, tokens, length, np.full(length.shape, 1 / count, np.float32), count
    )
