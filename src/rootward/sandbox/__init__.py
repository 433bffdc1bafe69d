"""Small worlds with planted truth, generated and trained in seconds."""
