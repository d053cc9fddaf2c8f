"""Text: vocabularies, packed documents, and sentence pairs."""
