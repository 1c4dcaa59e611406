"""Control a run from outside: status, attach, logs, stop."""
