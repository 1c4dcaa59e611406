"""DeepSpeed, the device and what watches both."""
