"""Start a run: preflight, display, detach."""
