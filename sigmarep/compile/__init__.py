"""Ahead-of-time compilation: programs for devices that are not there, and their cost."""
