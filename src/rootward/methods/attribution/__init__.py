"""Which documents? Methods that score every training document against a behaviour."""
