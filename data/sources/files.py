"""Which of the files that a directory holds belong to a dataset."""

from manta.data.errors import InputError


def without_dataset_metadata(location: str, paths: list[str]) -> list[str]:
    """Remove what `datasets` saves beside a dataset's tables: JSON metadata, and cached tables computed from them.

    Raises InputError for a dataset that was saved in several splits.
    """
    by_folder: dict[str, set[str]] = {}
    for path in paths:
        folder, _, name = path.rpartition("/")
        by_folder.setdefault(folder, set()).add(name)
    for folder, names in by_folder.items():
        if "dataset_dict.json" in names:
            splits = ", ".join(sorted(other.rpartition("/")[2] for other, saved in by_folder.items() if "state.json" in saved))
            raise InputError(
                f"data.sources: {location!r}: expected one split of a dataset, got several. Name a folder of {folder}: {splits}."
            )
    metadata = {"state.json", "dataset_info.json"}
    saved = {folder for folder, names in by_folder.items() if metadata <= names and any(name.endswith(".arrow") for name in names)}
    parts = [(path, *path.rpartition("/")[::2]) for path in paths]
    return [path for path, folder, name in parts if folder not in saved or (name not in metadata and not name.startswith("cache-"))]
