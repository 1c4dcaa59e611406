"""Use a trained model. No rank imports this."""
