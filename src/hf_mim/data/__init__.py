"""Pictures: reading, augmenting, finding and drawing them. Nothing here imports a model."""
