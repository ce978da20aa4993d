"""What makes a representation good: figures of any encoder's patch tokens, over any number of images."""
