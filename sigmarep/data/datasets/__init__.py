"""TFDS builders of this project, one data set per file; read through `sigmarep.data.sources`."""
