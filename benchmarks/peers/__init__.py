"""Other libraries on the same model, documents and queries: one adapter each, run in an environment of their own."""
