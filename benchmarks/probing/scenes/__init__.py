"""Rendered rooms of solid shapes, whose geometry is known exactly: data for a first look, without downloads."""
