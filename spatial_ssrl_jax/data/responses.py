"""Responses as tokens and as text, whatever a model's folder makes of the thought's tags."""

import numpy as np
from transformers import PreTrainedTokenizerBase

_OPEN, _CLOSE = "<think>", "</think>"


class ResponseCodec:
    """Encodes responses to learn and decodes sampled ones.

    Some tokenizers make the thought's tags special tokens, which decoding would drop, and some chat
    templates open the thought themselves, so that no response does.

    Args:
      tokenizer: of the model's folder.
      end_id: the token that ends a response to learn.
      opening: what the chat template begins the assistant's turn with.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, end_id: int, opening: str):
        self._tokenizer, self._end_id = tokenizer, end_id
        thought = opening.rfind(_OPEN)
        is_open = thought >= 0 and _CLOSE not in opening[thought:]
        self.prefix = opening[thought:] if is_open else ""
        self._hidden = {
            token_id
            for token_id, token in tokenizer.added_tokens_decoder.items()
            if token.special and token.content not in (_OPEN, _CLOSE)
        }

    def encode(self, text: str) -> np.ndarray:
        """[R] int32 token ids of a response, the end token included.

        What the chat template has opened is left out.
        """
        for prefix in (self.prefix, self.prefix.rstrip()):
            if prefix and text.startswith(prefix):
                text = text.removeprefix(prefix)
                break
        ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return np.array([*ids, self._end_id], np.int32)

    def decode(self, ids: np.ndarray) -> str:
        """Text of response tokens: without special tokens, but for the thought's tags, and with
        what the chat template has opened."""
        kept = [i for i in np.asarray(ids).tolist() if i not in self._hidden]
        text = self._tokenizer.decode(kept)
        assert isinstance(text, str)  # a list only for a batch
        return self.prefix + text
