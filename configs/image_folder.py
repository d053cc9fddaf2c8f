"""A σReparam ViT on one's own pictures, a folder for each class: my_pictures/cat/1.jpg, my_pictures/dog/2.png, …

    python scripts/train.py --config configs/image_folder.py --config.data.folder=my_pictures --workdir runs/mine
    python scripts/classify.py --workdir runs/mine --images other_pictures/

Arguments: folder, the same as --config.data.folder.
A fifth of the pictures is held out for testing, unless there are my_pictures/train/ and my_pictures/test/ (docs/data.md).
For photographs of some thousands rather than hundreds: a larger image_size and model, and more steps.
"""

from sigmarep.training.config import arguments, default_config


def get_config(text=""):
    args = arguments(text, folder="")
    config = default_config("image_classification")
    config.batch_size = 32
    config.total_steps = 400
    config.log_every_steps = 50
    config.eval_every_steps = 200
    config.checkpoint_every_steps = 200

    config.model.depth, config.model.width, config.model.num_heads, config.model.mlp_dim = 6, 64, 4, 128
    config.model.patch_size = 8
    config.model.reparam = "sigma"
    config.model.norm = "post"
    config.model.init_std = 0.1

    config.optimizer.name = "adam"
    config.optimizer.learning_rate = 1e-3
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 50
    config.ema_decay = 0.99

    config.data.name, config.data.folder = "image_folder", args["folder"]
    config.data.image_size = 64
    config.data.mean = config.data.std = (0.5, 0.5, 0.5)
    config.data.num_threads = 2
    config.data.augment.crop = "resized"
    config.data.augment.crop_scale = (0.4, 1.0)
    config.data.augment.flip = True
    return config
