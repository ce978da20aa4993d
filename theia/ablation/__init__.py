"""Sweeps: a grid of trainings in, a table and a picture out."""
