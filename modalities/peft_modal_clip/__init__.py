"""Contrastive image-text models: open_clip backbones, generated picture-caption pairs, and contrastive training."""
