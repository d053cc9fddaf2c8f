"""A σReparam speech Transformer on synthesised speech (espeak-ng reading clauses of Python's help in many voices).

    python scripts/train.py --config configs/asr/quickstart.py --workdir runs/asr

Prints word and character error rates on held-out clauses in held-out voices (test) and in voices of the training split
(test_sentences), beside those of the most frequent transcript and of the transcript of the most similar utterance.

Arguments: reparam (sigma), norm (post), disjoint (1: one projection of queries and keys; 0: one of all three; 2: three).
"""

from sigmarep.tasks.speech_recognition import DISJOINT
from sigmarep.training.config import arguments, choice, default_config


def get_config(text=""):
    args = arguments(text, reparam="sigma", norm="post", disjoint=1)
    config = default_config("speech_recognition")
    config.batch_size = 64
    config.total_steps = 450
    config.log_every_steps = 25
    config.checkpoint_every_steps = 150
    config.baselines = True

    config.model.depth, config.model.width, config.model.num_heads, config.model.mlp_dim = 3, 144, 4, 432
    config.model.reparam, config.model.norm = args["reparam"], args["norm"]
    config.model.kernel_init = "normal" if args["reparam"] == "sigma" else "fan_in_uniform"
    config.model.dropout = 0.1
    config.model.max_global_shift = 0.0
    config.model.qkv = choice("disjoint", args["disjoint"], DISJOINT)

    config.optimizer.name = "adam"
    config.optimizer.learning_rate = 4e-3
    config.optimizer.beta2 = 0.98
    config.optimizer.warmup_steps = 100

    config.decoding.beam_size = 16
    config.decoding.language_model = "ngram"
    # Chosen on the split dev: scripts/choose_decoding.py.
    config.decoding.language_weight = 0.5
    config.decoding.insertion_bonus = 2.0

    config.data.eval_splits = ("test", "test_sentences")
    config.data.buckets = (1.5, 2.5, 5.0)
    config.data.in_memory = True
    return config
