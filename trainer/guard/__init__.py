"""The guard against loss spikes: it finds them, names their text, and keeps them out of training."""
