"""Modules written to be hard for recipes."""
