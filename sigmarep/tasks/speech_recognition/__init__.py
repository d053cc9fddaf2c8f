"""Speech recognition with CTC, scored by word and character error rates."""

from sigmarep.tasks.speech_recognition.data import open_data, word_error_rate
from sigmarep.tasks.speech_recognition.model import DISJOINT, FIELDS, create_model, default_config, planned_files

__all__ = ["DISJOINT", "FIELDS", "create_model", "default_config", "open_data", "planned_files", "word_error_rate"]
