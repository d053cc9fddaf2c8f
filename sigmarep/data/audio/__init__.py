"""Speech: log-mel features, utterances, and the labels of CTC."""
