"""Transcripts of a split as files: every transcript, the worst, and tables by speaker and by duration."""

import json
from collections.abc import Sequence

from sigmarep.data.audio.speech import SpeechCorpus
from sigmarep.tasks import error_rates
from sigmarep.tasks.protocol import Outputs

SAMPLES = 5
WORST = 50
# Seconds: the upper ends of the groups of the table by duration, but for the last.
DURATIONS = (1.0, 2.0, 4.0, 8.0, 16.0)


def outputs(corpus: SpeechCorpus, index: Sequence[int], texts: Sequence[str]) -> Outputs:
    """Files `transcripts.tsv`, `worst.tsv`, `by_speaker.tsv`, `by_duration.tsv` and `report.json`, which counts and names
    what is odd, and a few lines to look at.

    Args:
      index: utterances of the corpus. texts: what was heard in each.
    """
    references = [corpus.texts[i] for i in index]
    rows = [
        (corpus.names[i], corpus.speakers[i], f"{corpus.seconds[i]:.2f}", reference, text)
        for i, reference, text in zip(index, references, texts, strict=True)
    ]
    errors = error_rates.errors_of_each(references, texts)
    worst = sorted(range(len(rows)), key=lambda i: (-errors[i], i))[:WORST]
    header = ("utterance", "speaker", "seconds", "reference", "heard")
    files = {
        "transcripts.tsv": _table(header, rows),
        "worst.tsv": _table(("word_errors", *header), [(str(errors[i]), *rows[i]) for i in worst if errors[i]]),
        "by_speaker.tsv": _groups("speaker", [corpus.speakers[i] for i in index], references, texts),
        "by_duration.tsv": _groups(
            "seconds", error_rates.duration_groups([corpus.seconds[i] for i in index], DURATIONS), references, texts
        ),
    }
    spread = [i * len(rows) // SAMPLES for i in range(min(SAMPLES, len(rows)))]
    files["report.json"] = json.dumps(corpus.report, indent=2, ensure_ascii=False) + "\n"
    return Outputs(files, [f"{references[i]} → {texts[i]}" for i in spread])


def _groups(name, groups, references, texts) -> str:
    header = (name, "utterances", "words", "wer", "substitutions", "deletions", "insertions", "cer")
    rows = [
        (
            row.group,
            str(row.utterances),
            str(row.words.reference_length),
            f"{row.words.rate:.4f}",
            str(row.words.substitutions),
            str(row.words.deletions),
            str(row.words.insertions),
            f"{row.characters.rate:.4f}",
        )
        for row in error_rates.by_group(groups, references, texts)
    ]
    return _table(header, rows)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["\t".join(part.replace("\t", " ").replace("\n", " ") for part in row) for row in (header, *rows)]
    return "\n".join([*lines, ""])
