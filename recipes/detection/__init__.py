"""Recipes of object detection, and the results matrix."""
