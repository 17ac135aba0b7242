"""The project's TFDS builder; TFDS needs a builder in a package of its own."""
