"""Parts of data modules that are the same for every modality: folders on disk, reproducible epochs, a cache."""
