"""Images: normalization, augmentation, and views for contrastive learning."""
