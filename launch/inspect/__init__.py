"""`manta data`: inspect a corpus, its mixture, and the text of a step."""
