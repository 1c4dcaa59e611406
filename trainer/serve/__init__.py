"""Use a trained model: text generation."""
