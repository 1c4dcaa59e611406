"""The guard against loss spikes: it finds them, names their text, and leaves them out of training."""
