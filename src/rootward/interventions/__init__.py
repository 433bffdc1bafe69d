"""Changes of the training data. Each can be undone; weights and activations are not touched here."""
