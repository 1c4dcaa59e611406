"""What is in the data? `manta data`: a corpus, its files, its mixture, and the text of a step."""
