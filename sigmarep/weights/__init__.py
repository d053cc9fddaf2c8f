"""Weights in and out: files of arrays, the names that other projects give to a ViT's parameters, and taking them over."""
