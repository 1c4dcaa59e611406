"""Which tokens are in sample g: mixture, order, packing and windows."""
