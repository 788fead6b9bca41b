"""The vision modality: timm's ViT, Swin and ConvNeXt, pictures of classes and scenes with masks."""
