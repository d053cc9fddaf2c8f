"""Ahead-of-time compilation for absent devices, and the cost of compiled programs."""
