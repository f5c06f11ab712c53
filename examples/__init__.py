"""Recipes: each folder is one thing to do with the library, from its inputs to its report."""
