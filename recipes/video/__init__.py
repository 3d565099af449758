"""Recipes of video models, and the results matrix."""
