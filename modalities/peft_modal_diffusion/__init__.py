"""Stable Diffusion on your own images: captioned and subject folders, buckets of shapes, caches of latents."""
