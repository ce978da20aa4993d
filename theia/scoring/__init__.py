"""Scores of a trained student beyond its own translators; plug-ins add more."""
