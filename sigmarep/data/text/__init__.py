"""Text: vocabularies, packed documents, and pairs of sentences."""
