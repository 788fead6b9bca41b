"""The audio modality: the Audio Spectrogram Transformer, recordings of classes and generated sounds."""
