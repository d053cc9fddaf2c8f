"""Prepares a TFDS data set as array_record files, once; training then reads it without TensorFlow.

    python scripts/prepare_data.py --name cifar10 [--data_dir DIR]

Data sets from Python packages (digits, mnist5k, python_docs, interface_en_de, spoken_sentences) need nothing else.
libreoffice_help_en_de, fashion_mnist_package, gcide and stamp_recordings/es (fr, ro, ca, ru, bg, latin) need Debian
packages, which the error names. All others need `pip install "sigmarep[tf]"` on the machine that prepares them. For
imagenet2012 first put ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar into DIR/downloads/manual.
"""

from absl import flags

from sigmarep import command
from sigmarep.data import sources

NAME = flags.DEFINE_string("name", None, "Name of the data set, as in TFDS.")
DATA_DIR = flags.DEFINE_string("data_dir", None, "Folder of data sets; $TFDS_DATA_DIR or ~/tensorflow_datasets.")


def main() -> None:
    folder = sources.prepare(command.required("name", NAME.value), data_dir=DATA_DIR.value)
    print(f"prepared: {folder}")


if __name__ == "__main__":
    command.run(main)
