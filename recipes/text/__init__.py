"""Recipes of text models, and the results matrix."""
