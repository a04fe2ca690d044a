"""Breaks training on purpose, and judges from outside what is left."""
