"""What does the person want? Command line, run config, plan, report."""

__version__ = "0.1.0"
