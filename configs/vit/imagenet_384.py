"""ImageNet-21k pre-training without LayerNorm, then fine-tuning on ImageNet-1k at 384 pixels: two commands.

    python scripts/train.py --config configs/vit/imagenet_384.py:stage=pretrain --config.data.folder=DIR --workdir runs/i21k
    python scripts/train.py --config configs/vit/imagenet_384.py --config.init_from.path=runs/i21k --workdir runs/i21k_384

Arguments: stage (finetune; pretrain is ImageNet-21k at 224 pixels), variant (B/16), reparam (sigma), norm (none).

The second begins from the weights of the first, or of any file that docs/fine_tune_and_export.md names: the position
embeddings are resampled from 14 x 14 to 24 x 24 patches, and the head begins anew.

The paper's row "ImageNet-21k, then 384 fine-tuning" (90 epochs of pre-training) gives no settings that are at hand in a
form that can be quoted. This project's choice: pre-training as in configs/vit/imagenet_simplified.py; fine-tuning for 20
epochs with AdamW, batch 512, learning rate 1e-4, a decay of 0.75 from block to block, cosine with 1 epoch of warmup,
stochastic depth 0.1, label smoothing 0.1, and crops of at least half of the picture.
Not run by this project: it has only been built and checked, for want of the data.
"""

from sigmarep.data.images.transforms import imagenet_2012
from sigmarep.models.vit import variant
from sigmarep.training.config import arguments, choice, default_config


def get_config(text=""):
    args = arguments(text, stage="finetune", variant="B/16", reparam="sigma", norm="none")
    config = default_config("image_classification")
    config.log_every_steps = 50
    config.compute_dtype = "bfloat16"
    config.model.update(variant(args["variant"]))
    config.model.reparam = args["reparam"]
    config.model.norm = args["norm"]
    config.model.gamma_init = "sigma"
    config.model.qkv = "fused"
    config.model.drop_path = 0.1
    config.label_smoothing = 0.1
    imagenet_2012(config.data)
    choice("stage", args["stage"], {"pretrain": _pretrain, "finetune": _finetune})(config)
    return config


def _pretrain(config):
    # ImageNet-21k comes as a folder for each class; TFDS has no such set.
    config.data.name, config.data.held_out = "image_folder", 0.01
    config.data.eval_splits = ("test",)
    config.batch_size = 4096
    config.total_epochs = 90.0
    config.checkpoint_every_epochs = 1
    config.eval_every_epochs = 10
    config.optimizer.name = "lars"
    config.optimizer.momentum = 0.9
    config.optimizer.learning_rate = 0.1 * config.batch_size / 256
    config.optimizer.schedule = "step"
    config.optimizer.step_at = (0.84,)
    config.optimizer.step_factor = 0.1


def _finetune(config):
    config.batch_size = 512
    config.total_epochs = 20.0
    config.checkpoint_every_epochs = 1
    config.eval_every_epochs = 5
    config.ema_decay = 0.9999
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 1e-4
    config.optimizer.layer_decay = 0.75
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_epochs = 1
    config.optimizer.weight_decay = 0.05
    config.data.image_size = 384
    config.data.eval_crop = 1.0
    config.data.augment.crop_scale = (0.5, 1.0)
