"""Recipes: YAML presets, one folder a modality, and the scripts that run them with accelerate."""
