"""From windows of text to training examples."""
