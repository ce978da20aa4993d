"""Theia where robots learn. Each example is run by a test and may be copied."""
