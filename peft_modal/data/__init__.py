"""Parts of data modules that are the same for every modality: splits, folders on disk, reproducible epochs, a cache."""
