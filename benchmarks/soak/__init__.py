"""A long training, watched: does it keep more and more memory, descriptors or processes?"""
