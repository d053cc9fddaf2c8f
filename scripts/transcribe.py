"""Writes down what is said in audio files with a trained speech model.

    python scripts/transcribe.py --workdir runs/asr --audio one.wav --audio two.flac

WAV, FLAC or OGG of any sampling rate; several channels are averaged. Prints a line for each file: its name, a tab, and the
words. Files that cannot be read, or last longer than anything the model was trained on, are named at the end with what is
wrong with them; the exit status is then 2.
"""

from absl import flags

from sigmarep import command
from sigmarep.errors import BadInput

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.")
AUDIO = flags.DEFINE_multi_string("audio", [], "An audio file; may be given several times.")


def main() -> None:
    workdir = command.required("workdir", WORKDIR.value)
    if not AUDIO.value:
        raise BadInput("--audio is missing: name an audio file")
    from sigmarep.data.audio import features
    from sigmarep.training.loop import restore
    from sigmarep.training.step import evaluation_variables

    experiment, _, state = restore(None, workdir)
    task = experiment.task
    if not hasattr(task, "transcribe"):
        raise BadInput(f"--workdir {workdir}: its task is {experiment.config.task}; speech_recognition is expected")
    rate = experiment.config.data.sample_rate
    longest = experiment.config.data.buckets[-1]
    utterances, problems = {}, []
    for path in AUDIO.value:
        try:
            recording = features.read(path)
        except features.AudioError as error:
            problems.append(str(error))
            continue
        seconds = len(recording.samples) / recording.rate
        if seconds > longest:
            problems.append(
                f"{path}: lasts {seconds:.1f} s; the model was given at most {longest} s (config.data.buckets)"
            )
            continue
        utterances[path] = features.resampled(recording.samples, recording.rate, rate)
    texts = task.transcribe(evaluation_variables(state), list(utterances.values())) if utterances else []
    for path, text in zip(utterances, texts, strict=True):
        print(f"{path}\t{text}")
    if problems:
        raise BadInput(f"--audio {'; '.join(problems)}")


if __name__ == "__main__":
    command.run(main)
