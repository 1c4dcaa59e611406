"""Where the ranks run, and what happens when one dies."""
