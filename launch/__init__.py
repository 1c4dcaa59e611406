"""The user interface: command line, run config, launch targets, inspection."""

__version__ = "0.1.0"
