"""Sweeps: from a grid of options to many trained students, and a table and a picture that compare them."""
