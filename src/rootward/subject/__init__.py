"""Models, documents, objectives, measurements and the training recipe.

Import from the files (`rootward.subject.subject`, ...); this module stays empty so that reading documents
does not load transformers.
"""
