"""CLIP ViT-L/14, the encoder that the heads were trained on."""
