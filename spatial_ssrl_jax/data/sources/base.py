"""The interface of a source of images: random access to records, by index."""

from typing import Protocol

from spatial_ssrl_jax.tasks.record import Record


class Source(Protocol):
    """A sequence of records that can be pickled, is cheap to construct, and reads pixels lazily.

    Attributes:
      spec: the SPEC that opened it, as the user wrote it.
      has_depth: whether its records have depth (a single record without it is a `BadImage`).
      has_distances: whether that depth is a distance, in metres or up to scale; else its order
        alone is right.
    """

    @property
    def spec(self) -> str: ...

    @property
    def has_depth(self) -> bool: ...

    @property
    def has_distances(self) -> bool: ...

    @property
    def inputs(self) -> tuple[str, ...]:
        """Files and folders that it reads, each perhaps with all that is below it."""
        ...

    def fingerprint(self) -> str:
        """A hash of its records: of all names, all files' sizes, and some of the content."""
        ...

    def __len__(self) -> int:
        """Number of records."""
        ...

    def name(self, index: int) -> str:
        """`self[index].name` without reading a pixel: unique in the source and stable over runs."""
        ...

    def size(self, index: int) -> tuple[int, int]:
        """(height, width) of a record's image from its header; raises `BadImage`."""
        ...

    def __getitem__(self, index: int) -> Record:
        """Reads one record; raises `BadImage` naming the file where it cannot be used."""
        ...
