"""What this machine offers: its device, its compiler and its peak speed."""
