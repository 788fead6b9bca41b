"""Point clouds: generated solids, file readers, Point-MAE, and the methods of this modality."""
