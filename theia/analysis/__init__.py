"""What makes a representation good: numbers and pictures of any encoder."""
