"""Sources of documents: files, tables and datasets, as input splits."""
