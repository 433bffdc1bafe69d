"""A pass over the documents feeds sinks: hooks, batches, projections and the on-disk store of gradients."""
