"""One file a data set: builders of this project, read through `sigmarep.data.sources`."""
