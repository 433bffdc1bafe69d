"""Did what was predicted happen? Exact retraining, removal with controls of equal size, and the statistics for it."""
