"""Diffusion: fine-tuning of Stable Diffusion on images of your own."""
