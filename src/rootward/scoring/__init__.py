"""Products of stored rows with queries, agreement between methods: tensors and arrays in, no model."""
