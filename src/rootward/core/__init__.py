"""The nouns that pass between rooms, errors, the registry of methods, and run records."""
