"""Recipes of point clouds, and the results matrix."""
