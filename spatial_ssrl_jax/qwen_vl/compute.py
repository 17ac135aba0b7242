"""How programs compute, as one value: dtype, rematerialisation, attention kernels, sharding."""

from dataclasses import dataclass
from typing import Literal

import jax
from jax import Array
from jax.sharding import Mesh, NamedSharding

Dtype = Literal["float32", "bfloat16"]
Remat = Literal["none", "dots", "full"]


@dataclass(frozen=True)
class AttentionKernel:
    """What computes attention over many tokens, or in a decode step.

    Attributes:
      name: one of `kernels.KERNELS`, or of `kernels.DECODE_KERNELS` for a decode step.
      mesh: the devices; None where arrays are on one. The compiler cannot shard Pallas kernels.
      rows, heads: mesh axes that rows and heads are sharded over.
      interpret: run a Pallas kernel in interpret mode, to check it where its device is missing.
    """

    name: str = "xla"
    mesh: Mesh | None = None
    rows: tuple[str, ...] = ("data", "fsdp")
    heads: str = "tensor"
    interpret: bool = False


XLA = AttentionKernel()


@dataclass(frozen=True)
class Compute:
    """How programs run, apart from what they compute.

    Attributes:
      dtype: compute dtype.
      attention_chunk: queries that attend at a time, by `xla`, by `cudnn` in rows, and in windows.
      vocab_block: entries of the vocabulary whose logits exist at a time, for all tokens.
      remat: what the backward pass recomputes of each layer: nothing (`none`), all but matmuls with
        weights and fused attention (`dots`), or all (`full`).
      attention: the kernel of attention over many tokens.
      decode_attention: the kernel of a decode step's attention.
      batch_sharding: sharding of the rows of activations; None leaves it to the compiler, which on
        a mesh would rather shard their widths, as those of the weights are, and sum whole batches.
    """

    dtype: Dtype = "float32"
    attention_chunk: int = 1024
    vocab_block: int = 4096
    remat: Remat = "full"
    attention: AttentionKernel = XLA
    decode_attention: AttentionKernel = XLA
    batch_sharding: NamedSharding | None = None

    def constrain(self, x: Array) -> Array:
        """Activations [rows, …] constrained to `batch_sharding` inside a jitted program."""
        if self.batch_sharding is None:
            return x
        return jax.lax.with_sharding_constraint(x, self.batch_sharding)
