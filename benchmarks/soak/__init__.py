"""Watches a long training: does it hold more and more memory, descriptors or processes?"""
