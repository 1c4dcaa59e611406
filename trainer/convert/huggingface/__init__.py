"""Export to and import from directories of Hugging Face transformers, without transformers."""
