"""The project's TFDS builder; TFDS wants a builder in a package folder of its own."""
