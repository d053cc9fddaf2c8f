"""Transcribes audio files with a trained speech model.

    python scripts/transcribe.py --workdir runs/asr --audio one.wav --audio two.flac

WAV, FLAC, OGG or MP3 of any sampling rate; several channels are averaged. Prints a line for each file: its name, a tab, the
words. Files that cannot be read, or last longer than anything the model was trained on, are named at the end with what is
wrong with them; the exit status is then 2. The folder of the run is all that is needed, not its data.
"""

from absl import flags

from sigmarep import command
from sigmarep.errors import BadInput

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.")
AVERAGE = command.define_average_flag()
AUDIO = flags.DEFINE_multi_string("audio", [], "An audio file; may be given several times.")


def main() -> None:
    workdir = command.required("workdir", WORKDIR.value)
    if not AUDIO.value:
        raise BadInput("--audio is missing: name an audio file")
    from sigmarep.inference import open_run

    run = open_run(workdir, average=AVERAGE.value)
    recordings, problems = {}, []
    for path in AUDIO.value:
        try:
            recordings[path] = run.recording(path)
        except BadInput as error:
            problems.append(str(error))
    texts = run.transcribe(list(recordings.values()))
    for path, text in zip(recordings, texts, strict=True):
        print(f"{path}\t{text}")
    if problems:
        raise BadInput(f"--audio {'; '.join(problems)}")


if __name__ == "__main__":
    command.run(main, compiles=True)
