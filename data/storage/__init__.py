"""Local directories and object stores."""
