"""A σReparam speech Transformer on real people's voices: the recordings of Tux Paint's pictures in four languages.

    apt-get install tuxpaint-stamps-default
    python scripts/train.py --config configs/asr/recordings.py --workdir runs/recordings

Prints word and character error rates on held-out phrases, beside those of the most frequent transcript and of the
transcript of the most similar recording. Training and test share their speakers, not their phrases.

Arguments: language (latin: French, Spanish, Romanian and Catalan together; or one of fr, es, ro, ca, ru, bg), reparam
(sigma), norm (post), steps (1500).
"""

from sigmarep.training.config import arguments, default_config


def get_config(text=""):
    args = arguments(text, language="latin", reparam="sigma", norm="post", steps=1500)
    config = default_config("speech_recognition")
    config.batch_size = 64
    config.total_steps = args["steps"]
    config.log_every_steps = 50
    config.checkpoint_every_steps = 250
    config.baselines = True

    config.model.depth, config.model.width, config.model.num_heads, config.model.mlp_dim = 3, 144, 4, 432
    config.model.reparam, config.model.norm = args["reparam"], args["norm"]
    config.model.kernel_init = "normal" if args["reparam"] == "sigma" else "fan_in_uniform"
    config.model.dropout = 0.2
    config.model.max_global_shift = 0.0

    config.optimizer.name = "adam"
    config.optimizer.learning_rate = 4e-3
    config.optimizer.beta2 = 0.98
    config.optimizer.warmup_steps = 100

    config.decoding.beam_size = 16
    config.decoding.language_model = "ngram"
    # Chosen on the split dev: scripts/choose_decoding.py.
    config.decoding.language_weight = 0.8
    config.decoding.insertion_bonus = 1.5

    config.data.name = f"stamp_recordings/{args['language']}"
    config.data.buckets = (2.0, 4.0, 16.0)
    config.data.rows_multiple = 4
    config.data.in_memory = True
    config.data.spec_augment.freq_masks, config.data.spec_augment.freq_width = 2, 15
    config.data.spec_augment.time_masks, config.data.spec_augment.time_width = 2, 25
    return config
