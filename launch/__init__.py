"""What the user wants: command line, run config, targets, inspection."""

__version__ = "0.1.0"
